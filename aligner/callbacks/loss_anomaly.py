"""What is watched in every step: that losses and gradients are finite, and that losses do not jump."""

from __future__ import annotations

import collections
import math
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from aligner.backend.device import communication_device
from aligner.callbacks.checkpointing import CheckpointCallback
from aligner.common import run_folder
from aligner.common.console import log_rank0
from aligner.common.errors import SanityCheckError
from aligner.data.module import AlignDataModule
from aligner.model.policy import LossReduction

SHOWN = 8
"""Rows that a message names."""


class LossAnomalyCallback(pl.Callback):
    """Stops a run whose numbers are no numbers before it saves them, and names the rows.

    Megatron's own check of gradients is switched off for it: it ends one rank, in the middle of a step, with the
    number of a bucket.
    """

    WINDOW, ENOUGH = 100, 20
    """Steps that a loss is compared with, and how many of them must have been made."""

    def __init__(
        self,
        data: AlignDataModule,
        reduction: LossReduction,
        checkpoint: CheckpointCallback,
        *,
        loss_spike_std: float,
        run: Path,
    ) -> None:
        self.data, self.reduction, self.checkpoint, self.run = data, reduction, checkpoint, run
        self.loss_spike_std = loss_spike_std
        self._losses: collections.deque[float] = collections.deque(maxlen=self.WINDOW)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """The whole global batch has been through the model, and no weight has moved."""
        count: Any = torch.zeros((), dtype=torch.int64, device=communication_device())
        for _rows, broken_P in self.reduction.state.nonfinite:
            count += broken_P.sum().to(count.device)
        torch.distributed.all_reduce(count)
        found, self.reduction.state.nonfinite = self.reduction.state.nonfinite, []
        if not int(count):
            return
        own = [int(row) for index_P, broken_P in found for row in index_P[broken_P]]
        every: list[list[int]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(every, own)
        rows = sorted({row for part in every for row in part})
        # One that is written beside the training is that newest one.
        self.checkpoint.wait(trainer)
        raise SanityCheckError(
            f"step {trainer.global_step}: the loss of {len(rows)} of {self.data.examples_in(trainer.global_step)} "
            f"examples is not finite: {self._places(rows)}. No weight was changed by this step, and the newest "
            "checkpoint is from before it. Look at these rows; if nothing is wrong with them, lower optim.config.lr or "
            "optim.config.clip_grad, or train in float32 (trainer.plugins.gpu_precision=32)"
        )

    def after_step(self, trainer: pl.Trainer, loss: float, grad_norm: float | None) -> None:
        """Look at what a step came to, before anything is saved.

        Raises:
            GateError: the gradient was not finite, so that the weights no longer are.
        """
        step = trainer.global_step - 1
        if grad_norm is not None and not math.isfinite(grad_norm):
            self.checkpoint.wait(trainer)
            raise SanityCheckError(
                f"step {step}: the gradient norm is {grad_norm}, though every loss is finite; the newest checkpoint is "
                f"from before this step. Its rows: {self._places(self._rows(step))}. Look at the longest of them, "
                "lower optim.config.lr, or train in float32 (trainer.plugins.gpu_precision=32)"
            )
        if self.loss_spike_std and len(self._losses) >= self.ENOUGH:
            mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
            parent_key = (loss - mean) / deviation if deviation else 0.0
            if parent_key > self.loss_spike_std:
                told = (
                    f"the loss is {loss:.4g}, {parent_key:.1f} standard deviations above that of the last "
                    f"{len(self._losses)} steps ({mean:.4g} ± {deviation:.2g}); rows: {self._places(self._rows(step))}"
                )
                log_rank0(f"step {step}: {told}")
                if trainer.is_global_zero:
                    run_folder.add_note(self.run, step, told)
        self._losses.append(loss)

    def _rows(self, step: int) -> list[int]:
        units = self.data.global_batch(step)
        packs = self.data.packs.get("train")
        return [int(row) for unit in units for row in (packs[unit] if packs is not None else [unit])]

    def _places(self, rows: list[int]) -> str:
        examples = self.data.datasets["train"]
        shown = ", ".join(examples[row].source for row in rows[:SHOWN])
        return shown + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
