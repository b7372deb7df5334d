"""A recipe in ten lines, shown before it runs; `--dryrun` shows all of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import fiddle as fdl
import nemo_run as run


def summary(task: run.Partial, name: str) -> str:
    """Describe a recipe of `align` or `self_reward`, or the arguments of another command."""
    if _get(task, "trainer") is not None:
        lines = list(_recipe(task))
    elif _get(task, "iterations"):
        lines = [*_recipe(task.iterations[0].align), ("iterations", str(len(task.iterations)))]
    else:
        lines = [(str(argument), _shown(value)) for argument, value in task.__arguments__.items()]
    width = max((len(label) for label, _ in lines), default=0)
    shown = [f"  {label:<{width}}  {text}" for label, text in lines]
    return "\n".join([name, *shown, f"  {'':<{width}}  (--dryrun shows every part)"])


def _recipe(recipe: Any) -> Iterator[tuple[str, str]]:
    get = functools.partial(_get, recipe)
    stage = get("resume.init_stage.log.name")
    start = f"the stage {stage}, which runs first" if stage else get("resume.restore_config.path", "random weights")
    yield "model", f"{_shown(get('model.config'))} from {start}"
    yield "train", _files(get("data.train"))
    yield "validation", _files(get("data.validation"))
    yield (
        "batch",
        (
            f"{get('data.global_batch_size')} a step, {get('data.micro_batch_size')} a pass, {get('data.batching')}, "
            f"at most {get('data.seq_length')} tokens"
        ),
    )
    yield "loss", _losses(recipe)
    if get("peft") is not None:
        yield "peft", _shown(get("peft"))
    yield (
        "optimizer",
        (
            f"learning rate {get('optim.config.lr')}, {_name(get('optim.lr_scheduler'))}, "
            f"{_warmup(get('optim.lr_scheduler.warmup_steps', 0))}"
        ),
    )
    steps = get("trainer.max_steps", -1)
    yield "length", f"{steps} steps" if steps > 0 else f"{get('trainer.max_epochs')} epochs"
    yield "ranks", f"{get('trainer.num_nodes', 1)} x {get('trainer.devices')}, {_parallel(get('trainer.strategy'))}"
    yield "folder", f"{get('log.log_dir', 'nemo_experiments')}/{get('log.name')}"


def _warmup(steps: int | None) -> str:
    return "a tenth of the steps of warm-up, at most 10" if steps is None else f"{steps} steps of warm-up"


def _losses(recipe: Any) -> str:
    parts = []
    if weight := _get(recipe, "preference_loss_weight", 1.0):
        reference = _get(recipe, "reference")
        against = f" against {_name(reference)}" if reference is not None else ""
        parts.append(f"{weight:g} x {_shown(_get(recipe, 'loss'))}{against}")
    if weight := _get(recipe, "sft_loss_weight", 0.0):
        parts.append(f"{weight:g} x cross-entropy")
    return " + ".join(parts).replace("1 x ", "")


def _parallel(strategy: Any) -> str:
    sizes = {
        name: _get(strategy, f"{name}_parallel_size", 1) or 1
        for name in ("tensor_model", "pipeline_model", "context", "expert_model")
    }
    split = [f"{name.removesuffix('_model')} {size}" for name, size in sizes.items() if size > 1]
    return ", ".join(split) or "data parallel"


def _files(source: Any) -> str:
    if source is None:
        return "none"
    return f"made by {_name(source)}" if isinstance(source, fdl.Buildable) else str(source)


def _get(config: Any, path: str, default: Any = None) -> Any:
    """Return what a path names; the default where something on it is missing or None."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return default if config is None else config


def _name(config: Any) -> str:
    target = getattr(config, "__fn_or_cls__", config)
    return getattr(target, "__name__", str(target))


def _shown(config: Any) -> str:
    if not isinstance(config, fdl.Buildable):
        return repr(config) if isinstance(config, str | int | float | list | dict) else _name(config)
    plain = [(name, value) for name, value in config.__arguments__.items() if isinstance(value, int | float | str)]
    return f"{_name(config)}({', '.join(f'{name}={value}' for name, value in plain)})" if plain else _name(config)
