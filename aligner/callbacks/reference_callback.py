"""Callback that prepares the reference model, saves it with checkpoints, and synchronizes it after steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.callbacks import PEFT

from aligner.callbacks.optim_hyperparameters import collect, restore
from aligner.common.errors import CheckpointError, ConfigError
from aligner.data.batch import Split
from aligner.data.module import AlignDataModule
from aligner.model import adapters
from aligner.model.policy import LossReduction
from aligner.model.reference import Reference


class ReferenceCallback(pl.Callback):
    """Makes policy and reference ready before the first step of a job."""

    def __init__(
        self,
        *,
        data: AlignDataModule,
        reductions: dict[Split, LossReduction],
        reference: Reference | None,
        runs: Path,
        resumed: Path | None,
        start_adapters: Path | None,
    ) -> None:
        self.data, self.reductions, self.reference, self.runs = data, reductions, reference, runs
        self.resumed, self.start_adapters = resumed, start_adapters
        self._hyperparameters: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict() if self.reference else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["reference"]
        if bool(saved) != bool(self.reference):
            raise ConfigError(
                f"reference, loss: the run began {'with' if saved else 'without'} a reference and would go on "
                f"{'without' if saved else 'with'} one; restore them, or start under another log.name"
            )
        if self.reference:
            self.reference.load_state_dict(saved)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.reference:
            checkpoint["reference"] = self.reference.sharded_state()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # As the recipe has them: the checkpoint is not loaded yet.
        self._hyperparameters = collect(trainer)
        checkpoints: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(checkpoints, str(self.resumed))
        if len(set(checkpoints)) > 1:
            raise CheckpointError(
                f"log.log_dir: ranks find different newest checkpoints ({', '.join(sorted(set(checkpoints)))}): their "
                "file systems differ, or another job has just been at work here; run the same command again"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed is not None:
            restore(trainer, self._hyperparameters)
        self._add_adapters(trainer)
        if self.reference:
            logps = self.reference.prepare(trainer, self.data, runs=self.runs, resumed=self.resumed)
            for split, logps_NK in logps.items():
                self.reductions[split].reference = logps_NK.to(pl_module.device)

    def _add_adapters(self, trainer: pl.Trainer) -> None:
        """Adapters belong to the starting policy; NeMo would add them after the reference was scored."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PEFT):
                callback._maybe_apply_transform(trainer)
                if self.start_adapters is not None and self.resumed is None:
                    adapters.load(trainer, self.start_adapters)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.reference:
            self.reference.after_step(trainer.global_step)
