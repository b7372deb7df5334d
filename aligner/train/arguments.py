"""The arguments of a run, and values derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo.lightning import MegatronOptimizerModule, MegatronStrategy, NeMoLogger, Trainer
from nemo.lightning.pytorch.callbacks import PEFT

from aligner.callbacks.checkpointing import CheckpointCallback
from aligner.checkpoint.resume import Resume
from aligner.data.module import AlignDataModule
from aligner.losses.objective import Loss, Objective
from aligner.model.reference import Reference
from aligner.train.limits import Limits


@dataclass(kw_only=True)
class RunArguments:
    """Arguments of `aligner.align`. Checks, settings and provenance read them; `TrainingRun` carries them out."""

    model: Any
    data: AlignDataModule
    trainer: Trainer
    loss: Loss
    preference_loss_weight: float
    sft_loss_weight: float
    reference: Reference | None
    peft: PEFT | None
    log: NeMoLogger | None
    optim: MegatronOptimizerModule | None
    resume: Resume | None
    limits: Limits | None = None

    # ---- folders ----------------------------------------------------------------------------------------------

    @cached_property
    def logger(self) -> NeMoLogger:
        """NeMo's logger; `log`, or a default one."""
        return self.log or NeMoLogger()

    @property
    def runs(self) -> Path:
        """The folder that holds all runs."""
        return Path(self.logger.log_dir or Path.cwd() / "nemo_experiments").expanduser()

    @property
    def folder(self) -> Path:
        """The folder of this run."""
        return self.runs / self.logger.name

    # ---- parts ------------------------------------------------------------------------------------------------

    @cached_property
    def objective(self) -> Objective:
        """The training objective. Read it after `config_checks.check_arguments`."""
        return Objective(
            loss=self.loss, preference_loss_weight=self.preference_loss_weight, sft_loss_weight=self.sft_loss_weight
        )

    @property
    def used_reference(self) -> Reference | None:
        """The reference model, if the loss reads its log-probabilities."""
        return self.reference if self.objective.needs_reference else None

    @property
    def strategy(self) -> MegatronStrategy:
        return self.trainer.strategy  # type: ignore[return-value]

    @property
    def num_ranks(self) -> int:
        return self.trainer.num_nodes * self.trainer.num_devices

    @property
    def checkpoint_callback(self) -> CheckpointCallback:
        """When the run saves. Read it after `config_checks.check_arguments`."""
        callback = self.logger.ckpt
        assert isinstance(callback, CheckpointCallback)
        return callback

    @property
    def deterministic(self) -> Any:
        """`trainer.deterministic` as the recipe has it; torch's own flag may be left over from another run."""
        return getattr(self.trainer.__io__, "deterministic", None)
