"""When to validate: every n optimizer steps counted from the start of the run, also after a resume, and at its end.

Lightning counts batches since the process started, so a resumed run would validate at other steps than the run
it continues.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class ValidateAtSteps(_TrainingEpochLoop):
    """Lightning's loop over training batches with the decision to validate replaced."""

    began = 0
    """Optimizer steps made before this job."""

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        # The validation that is due where a job begins is made by aligner.callbacks.metrics_callback.
        return self.trainer.enable_validation and self.global_step != self.began and is_due(self.trainer)


def is_due(trainer: Any) -> bool:
    """Whether the steps made so far are a multiple of the interval, or all there are."""
    assert isinstance(trainer.val_check_interval, int)
    return trainer.global_step % trainer.val_check_interval == 0 or trainer.global_step == trainer.max_steps


def replace_loop(trainer: Any, *, max_steps: int) -> None:
    """Make `trainer` stop after `max_steps` and validate by them."""
    trainer.fit_loop.epoch_loop = ValidateAtSteps(trainer, trainer.min_steps, max_steps)
    trainer.fit_loop.max_epochs = -1


def validate_now(trainer: Any) -> None:
    """Run the validation of a fit outside its turn, as Lightning itself does between two steps."""
    loop = trainer.fit_loop.epoch_loop
    # A restored loop would go on in the middle of the validation that its checkpoint remembers.
    loop.val_loop.restarting = False
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
