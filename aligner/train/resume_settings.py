"""Settings that determine the numbers of a run; they are compared when the run is resumed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aligner.common.errors import ConfigError
from aligner.train.arguments import RunArguments

Settings = dict[str, Any]
"""Path in the recipe -> number, string, list or dictionary of these, or None."""

FIXED = ("reference", "peft", "model")
"""Settings that no resumed run can change: its checkpoints contain them."""

VERSIONS = ("nemo-align", "nemo-toolkit", "megatron-core", "torch", "lightning", "nemo_run")
"""Distributions whose versions are checkpoint metadata."""

ADDED: Settings = {
    "data.ranked_pairs": "best_worst",
    "data.ignore_columns": [],
    "data.date": "",
    "data.chat_template_kwargs": {},
}
"""Settings that earlier checkpoints do not have, with the values that their runs had."""

OF_DATA = (
    "seq_length",
    "seed",
    "global_batch_size",
    "apply_chat_template",
    "overlong",
    "ranked_pairs",
    "ignore_columns",
)
OF_MODEL = ("hidden_dropout", "attention_dropout", "moe_aux_loss_coeff", "moe_z_loss_coeff")
OF_OPTIMIZER = ("optimizer", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
NOT_OF_SCHEDULE = ("max_steps", "interval", "frequency", "monitor")


def collect(arguments: RunArguments) -> Settings:
    """Collect the settings of a run with prepared data.

    Parallelism, micro-batches, the number of steps, and the schedules of saving and validation are not included.
    """
    data, optim = arguments.data, arguments.optim
    assert optim is not None
    settings: Settings = {
        "preference_loss_weight": arguments.preference_loss_weight,
        "sft_loss_weight": arguments.sft_loss_weight,
    }
    if arguments.preference_loss_weight:
        settings |= _function_settings("loss", arguments.loss)
    if arguments.reference is not None and arguments.objective.needs_reference:
        settings |= _object_settings("reference", arguments.reference, without=("dir", "cpu_offload", "weights"))
    if arguments.peft is not None:
        settings |= _object_settings("peft", arguments.peft)
    settings |= {f"data.{name}": getattr(data, name) for name in OF_DATA}
    settings |= data.identity()
    settings["model"] = type(arguments.model).__name__
    settings |= {f"model.config.{name}": getattr(arguments.model.config, name, None) for name in OF_MODEL}
    settings |= {f"optim.config.{name}": getattr(optim.config, name, None) for name in OF_OPTIMIZER}
    settings |= _object_settings("optim.lr_scheduler", optim.lr_scheduler, without=NOT_OF_SCHEDULE)
    return {name: value for name, value in settings.items() if _is_plain(value)}


def checkpoint_metadata(arguments: RunArguments, settings: Settings) -> dict[str, Any]:
    """Return the metadata of a checkpoint, beside its step."""
    parallel, data = arguments.strategy.parallelism, arguments.data
    return {
        "consumed_samples": data.state_dict()["consumed_samples"],
        "epoch": arguments.trainer.global_step // data.steps_per_epoch,
        "settings": settings,
        "layout": {
            "ranks": arguments.trainer.world_size,
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "context": parallel.context_parallel_size,
            "expert": parallel.expert_model_parallel_size,
        },
        "imported": arguments.resume is not None and arguments.resume.imported,
        "versions": dict(versions()),
        "reference weights": getattr(arguments.reference, "weights", None),
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the installed version of each of `VERSIONS`; None for a folder on the path."""
    installed: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def compare(then: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return the differences as name -> (then, now).

    Args:
        allowed: names that may differ, as in `resume.allow_changes`; "loss" allows "loss.beta", too.

    Raises:
        ConfigError: a setting differs that may not, or an allowed name is not a setting.
    """
    then = {**ADDED, **then}
    names = {**then, **now}
    for name in allowed:
        if not any(_covers(name, known) for known in names):
            raise ConfigError(
                f"resume.allow_changes: {name!r} is no setting of this run; there are: {', '.join(names)}"
            )
    differ = {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}
    refused = {name: pair for name, pair in differ.items() if not any(_covers(a, name) for a in allowed)}
    refused |= {name: pair for name, pair in differ.items() if any(_covers(fixed, name) for fixed in FIXED)}
    if not refused:
        return differ
    shown = "; ".join(f"{name}: was {old!r}, is {new!r}" for name, (old, new) in sorted(refused.items()))
    fixed = [name for name in refused if any(_covers(path, name) for path in FIXED)]
    allow = "" if fixed else f", or go on all the same with resume.allow_changes={','.join(sorted(refused))}"
    raise ConfigError(
        f"{shown}. The run would no longer be the one that it was; restore what changed, or start under another "
        f"log.name{allow}"
    )


def check_experts(layout: Mapping[str, int], arguments: RunArguments, checkpoint: Path) -> None:
    """Check that the optimizer of a mixture of experts can be loaded.

    Raises:
        ConfigError: expert parallelism was switched on or off, which gives Megatron other optimizers.
    """
    then, now = layout.get("expert", 1), arguments.strategy.parallelism.expert_model_parallel_size
    distributed = arguments.optim is not None and arguments.optim.config.use_distributed_optimizer
    if (then > 1) != (now > 1) and not distributed:
        raise ConfigError(
            f"trainer.strategy.expert_model_parallel_size: was {then}, is {now}; without its distributed optimizer, "
            "Megatron cannot load what it saved for the one into the other. Go on with what it was, or begin another "
            f"run from these weights: another log.name, and resume.restore_config.path={checkpoint}"
        )


def _covers(allowed: str, name: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def _function_settings(path: str, function: Callable[..., Any]) -> Settings:
    """Return a function's name, its arguments and its default arguments."""
    keywords: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        keywords = {**function.keywords, **keywords}
        function = function.func
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    settings: Settings = {path: getattr(function, "__qualname__", type(function).__name__)}
    for name, value in {**defaults, **keywords}.items():
        if isinstance(value, list | tuple) and any(map(callable, value)):
            for i, part in enumerate(value):
                settings |= _function_settings(f"{path}.{name}[{i}]", part)
        elif callable(value):
            settings |= _function_settings(f"{path}.{name}", value)
        else:
            settings[f"{path}.{name}"] = list(value) if isinstance(value, tuple) else value
    return settings


def _object_settings(path: str, value: Any, *, without: Sequence[str] = ()) -> Settings:
    """Return an object's class and the arguments of its constructor."""
    if value is None:
        return {path: None}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
    else:
        names = [name for name in inspect.signature(type(value).__init__).parameters if name != "self"]
    arguments = {name: getattr(value, name) for name in names if name not in without and hasattr(value, name)}
    return {path: type(value).__name__} | {f"{path}.{name}": argument for name, argument in arguments.items()}
