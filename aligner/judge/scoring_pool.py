"""Scores of responses by worker processes with limits: a function that hangs or dies costs one score.

Each worker has one response at a time. A worker that takes too long or ends is replaced.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from aligner.common.errors import ConfigError, UserError
from aligner.common.process_pool import end_with_parent, hidden_main_module

JsonObject = dict[str, Any]
ScoreFunction = Callable[[JsonObject, str], float]
START_SECONDS = 300
"""How long a worker may take to import the function."""


@dataclass(frozen=True)
class Outcome:
    """What became of one response."""

    score: float | None
    reason: str = ""
    """Why there is no score, in one line."""
    error: UserError | KeyError | None = None
    """An exception about the row or an argument, which is the same for every response."""


def scores(
    function: ScoreFunction, tasks: Sequence[tuple[JsonObject, str]], *, workers: int, seconds: float, memory_mb: int
) -> Generator[tuple[int, Outcome], None, None]:
    """Yield the number of each task, a row and a response, with its outcome, as they come.

    Raises:
        ConfigError: the function cannot be passed to another process, or not be imported there.
    """
    payload = _pickled(function)
    pool = [_Worker(payload, memory_mb) for _ in range(min(workers, len(tasks)))]
    waiting, done = iter(range(len(tasks))), 0
    try:
        while done < len(tasks):
            for worker in pool:
                if worker.ready and worker.task is None and (task := next(waiting, None)) is not None:
                    worker.begin(task, tasks[task], seconds)
            left = min(worker.deadline for worker in pool) - time.monotonic()
            wait([part for worker in pool for part in (worker.pipe, worker.process.sentinel)], max(0, min(left, 3600)))
            for i, worker in enumerate(pool):
                outcome = worker.take(seconds)
                if outcome is not None:
                    assert worker.task is not None
                    yield worker.task, outcome
                    done, worker.task = done + 1, None
                if worker.ended:
                    pool[i] = _Worker(payload, memory_mb)
    finally:
        for worker in pool:
            worker.end()


def _pickled(function: ScoreFunction) -> bytes:
    try:
        return pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"judge.function: {function!r} cannot be passed to a worker process ({error}); define it at the top of a "
            "module, with functools.partial for its arguments"
        ) from None


class _Worker:
    """A process of the pool, as its parent sees it."""

    def __init__(self, payload: bytes, memory_mb: int) -> None:
        # Spawn, not fork: this process may have threads of torch.
        context = multiprocessing.get_context("spawn")
        self.pipe, pipe = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(pipe, payload, memory_mb), daemon=False)
        # A function of the main script needs it.
        hidden = contextlib.nullcontext() if b"__main__" in payload else hidden_main_module()
        with hidden:
            self.process.start()
        pipe.close()
        self.ready = self.ended = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def begin(self, task: int, content: tuple[JsonObject, str], seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it has ended, which `take` sees
            self.pipe.send(content)

    def take(self, seconds: float) -> Outcome | None:
        """Return the outcome of its task, if there is one; end the process at its deadline."""
        try:
            message = self.pipe.recv() if self.pipe.poll() else None
            alive = message is not None or self.process.is_alive()
        except (EOFError, OSError):
            alive, message = False, None
        if not alive:
            self.process.join(1)
            self.end()
            return self._died()
        if message is not None:
            self.deadline = math.inf
            if self.ready:
                return message
            if message.error is not None:
                raise message.error
            self.ready = True
        elif time.monotonic() > self.deadline:
            self.end()
            if not self.ready:
                raise ConfigError(f"judge.function: a worker process did not import it within {START_SECONDS} s")
            return Outcome(None, f"took more than {seconds:g} s")
        return None

    def _died(self) -> Outcome | None:
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if not self.ready:
            raise ConfigError(
                f"judge.function: a worker process {how} before it could import the function; a script that defines it "
                'needs `if __name__ == "__main__":` around what it does'
            )
        return None if self.task is None else Outcome(None, f"the worker process {how}")

    def end(self) -> None:
        self.ended = True
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, payload: bytes, memory_mb: int) -> None:
    """Score what comes over the pipe, in a process of its own."""
    end_with_parent()
    try:
        function = pickle.loads(payload)
    except Exception as error:
        reason = f"judge.function: a worker process cannot import it ({type(error).__name__}: {_line(error)}); "
        pipe.send(Outcome(None, error=ConfigError(reason + "define it in a module that can be imported")))
        return
    _limit_memory(memory_mb)
    pipe.send(Outcome(None))
    while True:
        try:
            row, response = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(function, row, response))


def _outcome(function: ScoreFunction, row: JsonObject, response: str) -> Outcome:
    try:
        score = float(function(row, response))
    except (UserError, KeyError) as error:
        return Outcome(None, error=error)
    except BaseException as error:
        return Outcome(None, f"{type(error).__name__}: {_line(error)}".removesuffix(": "))
    return Outcome(score) if math.isfinite(score) else Outcome(None, f"the score is {score}, which is no finite number")


def _line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 200 characters of it."""
    try:
        return str(error).strip().partition("\n")[0][:200]
    except Exception:
        return ""


def _limit_memory(memory_mb: int) -> None:
    """Limit the address space to what the process has after its imports, and `memory_mb` more."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # not Linux
        return
    pages = int(statm.read_text().split()[0])
    # The soft limit: what the function starts may set its own.
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (memory_mb << 20)
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
