"""Validation every n optimizer steps counted from the start of the run, also after a resume, and at its end.

Lightning counts batches since the process started, so a resumed run would validate at other steps than before.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class ValidateAtSteps(_TrainingEpochLoop):
    """Lightning's loop over training batches with another validation schedule."""

    began = 0
    """Optimizer steps before this job."""

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        # `MetricsCallback` runs the validation that is due at the start of a job.
        return self.trainer.enable_validation and self.global_step != self.began and is_due(self.trainer)


class EveryRunBegins(_FitLoop):
    """Lightning's loop that also begins where no step is left: a kill may have taken the last validation."""

    @property
    def skip(self) -> bool:
        return False


def is_due(trainer: Any) -> bool:
    """Return whether validation follows the current step: a multiple of the interval, or the last step."""
    assert isinstance(trainer.val_check_interval, int)
    return trainer.global_step % trainer.val_check_interval == 0 or trainer.global_step == trainer.max_steps


def replace_loop(trainer: Any, *, max_steps: int) -> None:
    """Make `trainer` stop after `max_steps` and validate by optimizer steps."""
    trainer.fit_loop.epoch_loop = ValidateAtSteps(trainer, trainer.min_steps, max_steps)
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.__class__ = EveryRunBegins


def validate_now(trainer: Any) -> None:
    """Run the validation of a fit off schedule, as Lightning itself does between two steps."""
    loop = trainer.fit_loop.epoch_loop
    # A restored loop would resume in the middle of the validation that its checkpoint recorded.
    loop.val_loop.restarting = False
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
