"""Text of a recipe's estimate: memory by part, time, parallel sizes that fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import nemo_run as run

from aligner.common.errors import ConfigError
from aligner.estimate import memory, parameters, recipe_plan, step_time
from aligner.estimate.memory import GPU, GPUS, Plan
from aligner.estimate.recipe_plan import Lengths


def format_estimate(
    recipe: run.Partial, gpu: str | GPU = "h100", mfu: str | float = 0.4, tokens: str | float | None = None
) -> str:
    """Format the estimate of a recipe.

    Args:
        recipe: a recipe of `align` or `self_reward`.
        gpu: a key of `memory.GPUS`, or a GPU.
        mfu: fraction of the GPU's peak.
        tokens: mean tokens per sequence; None: from the data.

    Raises:
        ConfigError: an argument is invalid, or the recipe's model is not a GPT model.
    """
    card = _resolve_gpu(gpu)
    peak_fraction = _parse_number("mfu", mfu, 0, 1)
    iterations = getattr(recipe, "iterations", None)
    training = recipe_plan.training_recipe(recipe)
    try:
        model = parameters.model_shape(training.model.config)
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.config: is no GPT config of NeMo's, whose sizes could be read ({error})") from None
    plan = recipe_plan.plan_of(training, mixed_precision=card.peak > 0)
    parts = [_header(recipe, model, plan, card)]
    if not model.vocabulary:
        parts.append("The vocabulary is the tokenizer's and not counted; set model.config.vocab_size.")
    parts.append(_memory_text(model, plan, card))
    if iterations:
        generation = dataclasses.replace(plan, **recipe_plan.engine_sizes(iterations[0].generate))
        parts.append(_generation_text(model, generation, card))
    if card.peak:
        data = None if iterations else recipe_plan.lengths(training)
        mean = None if tokens is None else _parse_number("tokens", tokens, 1)
        parts.append(_time_text(training, model, plan, card, peak_fraction, mean, data))
    return "\n\n".join(parts)


def _resolve_gpu(gpu: str | GPU) -> GPU:
    if isinstance(gpu, GPU):
        return gpu
    if gpu not in GPUS:
        raise ConfigError(f"gpu: is {gpu!r}; expected one of {', '.join(GPUS)}")
    return GPUS[gpu]


def _parse_number(name: str, value: str | float, low: float, high: float = float("inf")) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low < number <= high:
        raise ConfigError(
            f"{name}: is {value!r}; expected a number above {low:g}" + f", at most {high:g}" * (high < 1e9)
        )
    return number


# ---- as text ------------------------------------------------------------------------------------------------------


def _header(recipe: Any, model: parameters.ModelShape, plan: Plan, card: GPU) -> str:
    name = recipe.log.name if hasattr(recipe, "log") else recipe.output
    return (
        f"{name}: {model.parameters / 1e9:.3g}B parameters, {model.num_active_params / 1e9:.3g}B active parameters "
        f"per token\non {plan}"
    )


def _memory_text(model: parameters.ModelShape, plan: Plan, card: GPU) -> str:
    table = _table(f"memory of the fullest {'GPU' if card.peak else 'rank'}", memory.stage_memory(model, plan), card)
    if memory.total(model, plan) <= card.memory:
        return table
    other = memory.proposal(model, plan, card) if card.peak else None
    if other is None:
        return f"{table}\nOUT OF MEMORY"
    settings = {
        "trainer.num_nodes": -(-other.ranks // other.gpus_per_node),
        "trainer.strategy.tensor_model_parallel_size": other.tensor,
        "trainer.strategy.sequence_parallel": other.sequence_parallel,
        "trainer.strategy.pipeline_model_parallel_size": other.pipeline,
    }
    if model.experts:
        settings |= {
            "trainer.strategy.expert_model_parallel_size": other.expert,
            "trainer.strategy.expert_tensor_parallel_size": other.expert_tensor,
        }
    if plan.virtual > 1:
        settings["trainer.strategy.virtual_pipeline_model_parallel_size"] = None
    if plan.recompute_all and not other.recompute_all:
        settings["model.config.recompute_granularity"] = None
    if other.recompute_all:
        settings |= {
            "model.config.recompute_granularity": "full",
            "model.config.recompute_method": "uniform",
            "model.config.recompute_num_layers": 1,
        }
    settings_text = " ".join(f"{name}={'null' if value is None else value}" for name, value in settings.items())
    needs = memory.total(model, other) / 1e9
    return f"{table}\nOUT OF MEMORY. What fits ({needs:.0f} GB), on {other}:\n  {settings_text}"


def _generation_text(model: parameters.ModelShape, plan: Plan, card: GPU) -> str:
    return _table(f"while it writes {plan.kv_sequences} answers at a time", memory.generation_memory(model, plan), card)


def _table(title: str, parts: dict[str, float], card: GPU) -> str:
    width = max(40, len(title) + 2)
    lines = [f"{title:<{width}}{'GB':>8}", "-" * (width + 8)]
    lines += [f"{name:<{width}}{value / 1e9:>8.2f}" for name, value in parts.items() if value]
    lines.append("-" * (width + 8))
    lines.append(
        f"{'of ' + format(card.memory / 1e9, '.0f') + ' (' + card.name + ')':<{width}}{sum(parts.values()) / 1e9:>8.2f}"
    )
    return "\n".join(lines)


def _time_text(
    recipe: Any,
    model: parameters.ModelShape,
    plan: Plan,
    card: GPU,
    mfu: float,
    tokens: float | None,
    data: Lengths | None,
) -> str:
    mean = tokens or (min(data.mean, plan.longest) if data else plan.longest)
    source = "as given" if tokens else "of data.train, at four characters each" if data else "data.seq_length"
    epochs = _limit(recipe.trainer.max_epochs) or 1
    seconds = step_time.step_seconds(model, plan, card, mfu=mfu, length=mean, epochs=epochs)
    tokens_per_gpu = plan.sequences * mean / seconds / plan.ranks
    lines = [
        f"time at {mfu:.0%} of {card.peak / 1e12:.0f} TFLOP/s, {mean:,.0f} tokens a sequence ({source})",
        f"  a step of {plan.sequences} sequences  {seconds:.3g} s, {plan.micro_batches} micro-batches a rank"
        + (f", {step_time.bubble(plan):.0%} more for the pipeline bubble" if plan.pipeline > 1 else ""),
        f"  tokens a second  {tokens_per_gpu:,.0f} a GPU, {tokens_per_gpu * plan.ranks:,.0f} in all",
    ]
    steps = _num_steps(recipe, data)
    if steps:
        hours = steps * seconds / 3600
        lines.append(f"  {steps:,} steps  {_duration(hours)}, {hours * plan.ranks:,.3g} GPU-hours")
    else:
        lines.append("  number of steps unknown: data.train does not exist yet, and trainer.max_steps is not set")
    return "\n".join(lines)


def _duration(hours: float) -> str:
    """Format a time in the unit in which one would say it."""
    seconds = 3600 * hours
    return f"{seconds:.2g} s" if seconds < 60 else f"{seconds / 60:.2g} min" if hours < 1 else f"{hours:.3g} h"


def _limit(value: int | None) -> int | None:
    """Return a limit of steps or epochs; None for Lightning's -1, no limit."""
    return value if (value or -1) > 0 else None


def _num_steps(recipe: Any, data: Lengths | None) -> int | None:
    max_steps = _limit(recipe.trainer.max_steps)
    if data is None:
        return max_steps
    epochs = _limit(recipe.trainer.max_epochs)
    data_steps = None if epochs is None else data.rows // recipe.data.global_batch_size * epochs
    return min((n for n in (max_steps, data_steps) if n is not None), default=None)
