"""Learning rates and optimizer settings: a resumed run follows its recipe, not its checkpoint."""

from __future__ import annotations

from typing import Any

POSITION = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "optimizer", "params", "lr", "step")
"""Fields with the position of a schedule or a parameter group, which come from the checkpoint."""


def collect(trainer: Any) -> list[dict[str, Any]]:
    """Settings of all schedules and parameter groups, without their position."""
    schedules = [dict(vars(config.scheduler)) for config in trainer.lr_scheduler_configs]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [{k: v for k, v in settings.items() if k not in POSITION} for settings in [*schedules, *groups]]


def restore(trainer: Any, wanted: list[dict[str, Any]]) -> None:
    """Put collected settings back after a checkpoint was loaded; the position stays the checkpoint's.

    A checkpoint brings its own settings along: a run that is made longer would keep the old, shorter cosine.
    """
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert len(wanted) == len(schedules) + len(groups)
    for scheduler, settings in zip(schedules, wanted, strict=False):
        if all(vars(scheduler).get(name) == value for name, value in settings.items()):
            continue
        vars(scheduler).update(settings)
        scheduler._get_lr_called_within_step = True
        rates = scheduler.get_lr()
        scheduler._get_lr_called_within_step = False
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for group, settings in zip(groups, wanted[len(schedules) :], strict=True):
        group.update(settings)
