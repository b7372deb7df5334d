"""One function over many pieces, on all cores of this machine, results in the order of the pieces."""

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
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def hidden_main_module() -> Iterator[None]:
    """Within it, this process's main script cannot be found.

    A process that is spawned within it (by us, or by Megatron's checkpoint writer) does not import the main script
    again. For `nemo llm align` that would import all of NeMo, some ten seconds, for nothing.
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
    """`make()(piece)` of every piece, beside the piece; `make` is called once a process and must be picklable.

    No more than a few pieces a worker are in flight. One worker is this process itself.
    """
    if workers <= 1:
        function = make()
        for piece in pieces:
            yield piece, function(piece)
        return
    # Spawned, not forked: this process may have threads of torch and of the tokenizer.
    context = multiprocessing.get_context("spawn")
    with (
        hidden_main_module(),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool,
    ):
        waiting: deque[tuple[Piece, Future[Result]]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(_call, piece)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
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
    # The processes are parallel already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _make = make
    end_with_parent()


def end_with_parent() -> None:
    """Have this process end when the one that spawned it does, and not before: a killed one says no farewell.

    Launchers and schedulers tell every process of a job to end, also those that the last save needs.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _call(piece: Any) -> Any:
    global _function
    assert _make is not None
    # Not while the process starts: an error there would be that of a broken pool.
    _function = _function or _make()
    return _function(piece)
