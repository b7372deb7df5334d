"""Worker processes: an ordered parallel map over all cores of a machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from aligner.common.errors import ConfigError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_make: Callable[[], Callable[[Any], Any]] | None = None
_function: Callable[[Any], Any] | None = None


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def hidden_main_module() -> Iterator[None]:
    """Hide the main script from spawned processes.

    A process spawned in this context (by this package or Megatron's checkpoint writer) does not import the main
    script again. For `nemo llm align`, that import would load all of NeMo and take about ten seconds.
    """
    main = sys.modules["__main__"]
    hidden = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def ordered_map(
    make: Callable[[], Callable[[Piece], Result]], pieces: Iterable[Piece], *, workers: int
) -> Iterator[tuple[Piece, Result]]:
    """Yield each piece with `make()(piece)`, in order; each process calls `make` once, and `make` must be picklable.

    At most about two pieces per worker are in flight. With one worker, this process does the work.
    """
    if workers <= 1:
        function = make()
        for piece in pieces:
            yield piece, function(piece)
        return
    # Spawn, not fork: this process may have threads of torch and of the tokenizer.
    context = multiprocessing.get_context("spawn")
    with (
        hidden_main_module(),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool,
    ):
        pending: deque[tuple[Piece, Future[Result]]] = deque()
        try:
            for piece in pieces:
                pending.append((piece, pool.submit(_call, piece)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a process that read rows beside this one was ended from outside, most likely for want of memory; "
                "free some, or allow fewer cores (taskset)"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _make
    # Workers already use all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _make = make
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent ends, also a killed parent, and not before.

    Launchers and schedulers signal every process of a job, including those that the last save needs.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def _call(piece: Any) -> Any:
    global _function
    assert _make is not None
    # Not in the initializer: an exception there would surface as BrokenProcessPool.
    _function = _function or _make()
    return _function(piece)
