"""What a job is held to, and how it ends before its time: preemption, time limits.

A first SIGTERM or SIGUSR1, or the end of the time that the job has, ends the step, saves, and ends the process with
exit code 75, which says that the same command should be run again. A second signal ends it at once; the newest
checkpoint is whole, since one is renamed into its place only when it is.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Optional

import lightning.pytorch as pl
import torch

from aligner.backend.device import communication_device
from aligner.callbacks.checkpointing import CheckpointCallback
from aligner.common.console import log_rank0
from aligner.common.errors import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The job was told to end, has saved, and is to be run again."""

    def __init__(self, reason: str) -> None:
        super().__init__(REQUEUE)
        self.reason = reason


class Preemption(pl.Callback):
    """Ends a job between two steps, on all ranks together, whichever of them was told to."""

    REASONS = (None, "its time is up", *(f"it received {s.name}" for s in SIGNALS))

    def __init__(self, max_seconds: float | None, checkpoint: CheckpointCallback, *, began: float) -> None:
        self.max_seconds, self.checkpoint, self.began = max_seconds, checkpoint, began
        self._told = 0
        self._handler: Any = None
        self._longest = 0.0
        self._step_began = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within this, the first signal asks for a stop and a second one ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def told(number: int, _: Optional[FrameType]) -> None:
            # A second one is the system's: it also ends a process that waits in a collective.
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            # A scheduler tells every process of a job: those that were forked from here, a data worker or a writer of
            # checkpoints, are needed until this one ends.
            if os.getpid() == process:
                self._told = 2 + SIGNALS.index(signal.Signals(number))

        self._handler = told
        before = {number: signal.signal(number, told) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, *_: Any) -> None:
        """Lightning has put handlers of its own before ours: they end the job with exit code 0, or save elsewhere."""
        if self._handler is not None and not self._told:
            for number in SIGNALS:
                signal.signal(number, self._handler)

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_began = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._longest = max(self._longest, time.monotonic() - self._step_began)
        if trainer.global_step != trainer.max_steps:
            self._end_if_told(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # The last validation is finished: a job that found all steps made would leave it out.
        if trainer.global_step != trainer.max_steps:
            self._end_if_told(trainer)

    def _end_if_told(self, trainer: pl.Trainer) -> None:
        told, limit = self._told, self.max_seconds
        # A job that made no step would be followed by another that makes none.
        moved = trainer.global_step > trainer.fit_loop.epoch_loop.began  # type: ignore[attr-defined]
        if not told and moved and limit is not None and time.monotonic() - self.began + self._longest > limit:
            told = 1
        agreed = torch.tensor(told, device=communication_device())
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        if not int(agreed):
            return
        reason = self.REASONS[int(agreed)]
        assert reason is not None
        saved = self.checkpoint.step_saved == trainer.global_step or not moved
        log_rank0(f"{reason}: {'nothing new to save' if saved else 'saving'} after step {trainer.global_step}")
        if not saved:
            self.checkpoint.save(trainer)
        self.checkpoint.wait(trainer)
        raise Preempted(reason)
