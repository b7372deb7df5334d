"""Preemption, interruption and time limit of a job.

On the first SIGTERM, SIGUSR1, SIGHUP (a terminal that closes) or SIGINT (Ctrl-C), or at the time limit, the job
finishes its step, saves, and exits with code 75: run the same command again. A second signal ends the job at once. The
newest checkpoint is complete even then, because a checkpoint is renamed into its place only when it is complete.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Optional

import lightning.pytorch as pl
import torch

from aligner.backend.device import communication_device
from aligner.callbacks.checkpointing import CheckpointCallback
from aligner.common.console import log_rank0
from aligner.common.errors import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
IGNORABLE = (signal.SIGHUP, signal.SIGINT)
"""Signals that `nohup` and shells have processes in the background ignore."""


class Preempted(SystemExit):
    """The job received a signal or reached its time limit, has saved, and is to be run again."""

    def __init__(self, reason: str) -> None:
        super().__init__(REQUEUE)
        self.reason = reason

    @property
    def by_user(self) -> bool:
        """Whether somebody pressed Ctrl-C, or interrupted a cell of a notebook."""
        return self.reason.endswith(signal.SIGINT.name)


class Preemption(pl.Callback):
    """Callback that ends a job between two steps, on all ranks together, if any rank received a signal."""

    def __init__(
        self,
        max_seconds: float | None,
        checkpoint: CheckpointCallback,
        *,
        began: float,
        more_signals: Sequence[int] = (),
    ) -> None:
        self.max_seconds, self.checkpoint, self.began = max_seconds, checkpoint, began
        self.signals = tuple(dict.fromkeys([*SIGNALS, *map(signal.Signals, more_signals)]))
        self.reasons = (None, "its time is up", *(f"it received {s.name}" for s in self.signals))
        self._request = 0
        """Index of the stop request in `reasons`; 0: none."""
        self._handler: Any = None
        self._handled: tuple[signal.Signals, ...] = ()
        self._longest = 0.0
        self._step_began = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals: the first requests a stop, a second ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()
        terminals = [stream for stream in (1, 2) if os.isatty(stream)]  # one that has closed is none any more

        def request_stop(number: int, _: Optional[FrameType]) -> None:
            # A second signal gets the system's handler, which also ends a process that waits in a collective.
            for handled in self._handled:
                kernel = handled == signal.SIGINT and "ipykernel" in sys.modules
                signal.signal(handled, signal.default_int_handler if kernel else signal.SIG_DFL)
            if number == signal.SIGHUP:
                _redirect_to_nowhere(terminals)
            # A scheduler signals every process of a job. Forked ones (data workers, checkpoint writers) are needed
            # until this process ends.
            if os.getpid() == process:
                self._request = 2 + self.signals.index(signal.Signals(number))

        self._handler = request_stop
        self._handled = tuple(
            number for number in self.signals if number not in IGNORABLE or signal.getsignal(number) != signal.SIG_IGN
        )
        previous = {number: signal.signal(number, request_stop) for number in self._handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_train_start(self, *_: Any) -> None:
        """Replace Lightning's handlers, which would end the job with exit code 0 or save elsewhere."""
        if self._handler is not None and not self._request:
            for number in self._handled:
                signal.signal(number, self._handler)

    def on_scoring_batch_end(self, trainer: pl.Trainer) -> None:
        """End between two batches of the reference's scoring, which precedes training and is done anew."""
        self._end_if_requested(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_began = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._longest = max(self._longest, time.monotonic() - self._step_began)
        if trainer.global_step != trainer.max_steps:
            self._end_if_requested(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # The last validation is completed: a resumed run with all steps made would skip it.
        if trainer.global_step != trainer.max_steps:
            self._end_if_requested(trainer)

    def _end_if_requested(self, trainer: pl.Trainer) -> None:
        request, limit = self._request, self.max_seconds
        # A job that makes no step would be followed by another that makes none.
        stepped = trainer.global_step > trainer.fit_loop.epoch_loop.began  # type: ignore[attr-defined]
        if not request and stepped and limit is not None and time.monotonic() - self.began + self._longest > limit:
            request = 1
        agreed = torch.tensor(request, device=communication_device())
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        if not int(agreed):
            return
        reason = self.reasons[int(agreed)]
        assert reason is not None
        saved = self.checkpoint.step_saved == trainer.global_step or not stepped
        log_rank0(f"{reason}: {'nothing new to save' if saved else 'saving'} after step {trainer.global_step}")
        if not saved:
            self.checkpoint.save(trainer)
        self.checkpoint.wait(trainer)
        raise Preempted(reason)


def _redirect_to_nowhere(terminals: list[int]) -> None:
    """Write no more to a terminal that has closed; every line would raise an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
