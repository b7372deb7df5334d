"""Detection of non-finite losses and gradients, and of loss spikes, in every step."""

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
"""Most rows that a message names."""


class LossAnomalyCallback(pl.Callback):
    """Callback that stops the run on a non-finite loss or gradient before a checkpoint is saved, and names the rows.

    It replaces Megatron's own check of gradients, which ends one rank in the middle of a step with a bucket's number.
    """

    WINDOW, ENOUGH = 100, 20
    """Number of last steps that a loss is compared with, and the fewest that suffice."""

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
        """Check all losses of the global batch before any weight changes."""
        count: Any = torch.zeros((), dtype=torch.int64, device=communication_device())
        for _rows, broken_P in self.reduction.state.nonfinite:
            count += broken_P.sum().to(count.device)
        torch.distributed.all_reduce(count)
        nonfinite, self.reduction.state.nonfinite = self.reduction.state.nonfinite, []
        if not int(count):
            return
        local_rows = [int(row) for index_P, broken_P in nonfinite for row in index_P[broken_P]]
        rows_by_rank: list[list[int]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(rows_by_rank, local_rows)
        rows = sorted({row for part in rows_by_rank for row in part})
        # The newest checkpoint may still be written asynchronously.
        self.checkpoint.wait(trainer)
        raise SanityCheckError(
            f"step {trainer.global_step}: the loss of {len(rows)} of {self.data.examples_in(trainer.global_step)} "
            f"examples is not finite: {self._sources(rows)}. No weight was changed by this step, and the newest "
            "checkpoint is from before it. Look at these rows; if nothing is wrong with them, lower optim.config.lr or "
            "optim.config.clip_grad, or train in float32 (trainer.plugins.gpu_precision=32)"
        )

    def after_step(self, trainer: pl.Trainer, loss: float, grad_norm: float | None) -> None:
        """Check a step's gradient norm and loss before anything is saved.

        Raises:
            SanityCheckError: the gradient was not finite, and so are the weights after the step.
        """
        step = trainer.global_step - 1
        if grad_norm is not None and not math.isfinite(grad_norm):
            self.checkpoint.wait(trainer)
            raise SanityCheckError(
                f"step {step}: the gradient norm is {grad_norm}, though every loss is finite; the newest checkpoint is "
                f"from before this step. Its rows: {self._sources(self._rows(step))}. Look at the longest of them, "
                "lower optim.config.lr, or train in float32 (trainer.plugins.gpu_precision=32)"
            )
        if self.loss_spike_std and len(self._losses) >= self.ENOUGH:
            mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
            z_score = (loss - mean) / deviation if deviation else 0.0
            if z_score > self.loss_spike_std:
                note = (
                    f"the loss is {loss:.4g}, {z_score:.1f} standard deviations above that of the last "
                    f"{len(self._losses)} steps ({mean:.4g} ± {deviation:.2g}); rows: {self._sources(self._rows(step))}"
                )
                log_rank0(f"step {step}: {note}")
                if trainer.is_global_zero:
                    run_folder.add_note(self.run, step, note)
        self._losses.append(loss)

    def _rows(self, step: int) -> list[int]:
        samples = self.data.global_batch(step)
        packs = self.data.packs.get("train")
        return [int(row) for sample in samples for row in (packs[sample] if packs is not None else [sample])]

    def _sources(self, rows: list[int]) -> str:
        examples = self.data.datasets["train"]
        shown = ", ".join(examples[row].source for row in rows[:SHOWN])
        return shown + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
