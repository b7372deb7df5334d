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
        # The validation that is due where a job begins is made by aligner.watching.
        return self.trainer.enable_validation and self.global_step != self.began and due(self.trainer)


def due(trainer: Any) -> bool:
    """Whether the steps made so far are a multiple of the interval, or all there are."""
    assert isinstance(trainer.val_check_interval, int)
    return trainer.global_step % trainer.val_check_interval == 0 or trainer.global_step == trainer.max_steps


def shape(trainer: Any) -> list[dict[str, Any]]:
    """What the recipe says of learning rates and optimizer, as it stands before a checkpoint is loaded."""
    schedules = [dict(vars(config.scheduler)) for config in trainer.lr_scheduler_configs]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [{k: v for k, v in held.items() if k not in POSITION} for held in [*schedules, *groups]]


def keep_shape(trainer: Any, wanted: list[dict[str, Any]]) -> None:
    """Have learning rates and optimizer follow the recipe again, from the step that the checkpoint is at.

    A checkpoint brings its own along: a run that is made longer would keep the old, shorter cosine.
    """
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert len(wanted) == len(schedules) + len(groups)
    for scheduler, held in zip(schedules, wanted, strict=False):
        if all(vars(scheduler).get(name) == value for name, value in held.items()):
            continue
        vars(scheduler).update(held)
        scheduler._get_lr_called_within_step = True
        rates = scheduler.get_lr()
        scheduler._get_lr_called_within_step = False
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for group, held in zip(groups, wanted[len(schedules) :], strict=True):
        group.update(held)


POSITION = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "optimizer", "params", "lr", "step")
"""What of a schedule or a group of weights says where it is, rather than what it is."""


def install(trainer: Any, *, max_steps: int) -> None:
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
