"""`nemo llm size`: what a recipe takes, told before a job is queued; a dry run tells it, too."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import nemo_run as run

from aligner import anatomy, sizing, sources
from aligner.context import AlignContext, load_yaml
from aligner.errors import ConfigError, RowError
from aligner.rows import PreferenceRow, Text, parse_line
from aligner.sizing import GPU, GPUS, Plan

HELP = f"""Memory of a GPU, time of a step and GPU-hours of a recipe, by arithmetic; nothing is run.

nemo llm size --factory llama3_70b_dpo trainer.num_nodes=4

nemo llm size --factory llama3_8b_dpo gpu=h200 mfu=0.35 tokens=900 data.train=train.jsonl

gpu= [h100]  one of {", ".join(GPUS)}

mfu= [0.4]  share of its peak that a GPU reaches while it does not wait for a pipeline

tokens=  of a sequence (prompt and response) on average; else those of data.train, at four characters a token, or if
that is no file data.seq_length

everything else is as in nemo llm align, or nemo llm self-reward, whose first round is looked at
"""

SAMPLE = 2000
"""Rows that a file's lengths are taken from."""
CHARACTERS = 4
"""Of a token, when no tokenizer is asked."""


def size() -> None:
    """What a recipe takes."""


class SizeContext(AlignContext):
    """Reads `gpu=`, `mfu=` and `tokens=` for itself and the rest as the command that would run the recipe."""

    own = ("gpu", "mfu", "tokens")
    recipes_of = ("align", "self-reward")

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        from aligner import factories
        from aligner.api import align
        from aligner.pipeline import self_reward
        from aligner.rounds_context import RoundsContext

        own, rest = self.split(task_args)
        of_rounds = (self.factory or "").partition("(")[0] in factories.names(self_reward)
        if self.yaml:
            of_rounds = load_yaml(Path(self.yaml)).__fn_or_cls__ is self_reward
        reader, command = (RoundsContext, self_reward) if of_rounds else (AlignContext, align)
        recipe = reader(name=self.name, factory=self.factory, yaml=self.yaml).parse_fn(command, rest)
        print(told(recipe, **own))


def told(
    recipe: run.Partial, gpu: str | GPU = "h100", mfu: str | float = 0.4, tokens: str | float | None = None
) -> str:
    """The size of a recipe as text.

    Args:
        recipe: of `align` or `self_reward`.
        gpu: one of `sizing.GPUS`.
        mfu: share of the peak.
        tokens: of a sequence on average; None: of the data.

    Raises:
        ConfigError: an argument is not one, or the recipe describes no GPT model.
    """
    card = _card(gpu)
    share = _number("mfu", mfu, 0, 1)
    rounds = getattr(recipe, "rounds", None)
    one = _training(recipe)
    try:
        model = anatomy.of(one.model.config)
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.config: is no GPT config of NeMo's, whose sizes could be read ({error})") from None
    plan = plan_of(one, half=card.peak > 0)
    parts = [_head(recipe, model, plan, card)]
    if not model.vocabulary:
        parts.append("The vocabulary is the tokenizer's and not counted; set model.config.vocab_size.")
    parts.append(_memory(model, plan, card))
    if rounds:
        parts.append(_answering(model, dataclasses.replace(plan, **_engine(rounds[0].generate)), card))
    if card.peak:
        data = None if rounds else lengths(one)
        parts.append(
            _time(one, model, plan, card, share, None if tokens is None else _number("tokens", tokens, 1), data)
        )
    return "\n\n".join(parts)


def this_machine(ranks: int) -> GPU:
    """Its GPU, or its memory where there is none, divided over the ranks of a run."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return GPU("memory of this machine a rank", psutil.virtual_memory().total / ranks, 0.0)
    found = torch.cuda.get_device_properties(0)
    known = (gpu for gpu in GPUS.values() if gpu.name.upper() in found.name.upper())
    return GPU(found.name, found.total_memory, next(known, GPUS["h100"]).peak)


def _card(gpu: str | GPU) -> GPU:
    if isinstance(gpu, GPU):
        return gpu
    if gpu not in GPUS:
        raise ConfigError(f"gpu: is {gpu!r}; expected one of {', '.join(GPUS)}")
    return GPUS[gpu]


def _number(name: str, value: str | float, above: float, most: float = float("inf")) -> float:
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if not above < found <= most:
        raise ConfigError(
            f"{name}: is {value!r}; expected a number above {above:g}" + f", at most {most:g}" * (most < 1e9)
        )
    return found


def _training(recipe: Any) -> Any:
    """A recipe of `align`: this one, or that of the first round."""
    return recipe.rounds[0].align if hasattr(recipe, "rounds") else recipe


def ranks(recipe: Any) -> int:
    """How many ranks a recipe asks for."""
    trainer = _training(recipe).trainer
    return int(trainer.num_nodes or 1) * int(trainer.devices)


def plan_of(recipe: Any, *, half: bool) -> Plan:
    """What of a recipe of `align` its size depends on."""
    strategy, data, config = recipe.trainer.strategy, recipe.data, recipe.model.config
    tensor, pipeline = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    loss = getattr(recipe, "loss", None)
    single = not recipe.preference_weight or getattr(loss, "__fn_or_cls__", loss).__module__ == "aligner.unpaired"
    responses = 1 if single else 2
    count, within = ranks(recipe), tensor * pipeline * strategy.context_parallel_size
    if count % within:
        raise ConfigError(
            f"trainer.num_nodes, trainer.devices: {count} ranks cannot be divided into groups of {within} (tensor x "
            "pipeline x context parallelism of trainer.strategy); give a multiple of it, or divide the model less"
        )
    per_micro, longest = data.micro_batch_size, data.seq_length
    packed = data.batching == "packed"
    micro = per_micro * (data.pack_size or responses * longest) if packed else per_micro * responses * longest
    reference = getattr(recipe, "reference", None)
    kind = "none" if reference is None or not recipe.preference_weight else reference.__fn_or_cls__.__name__
    # Its weights are in the host's memory; the forward pass is made all the same.
    kind = "adapters_off" if getattr(reference, "on_host", False) else kind
    optimizer = getattr(recipe.optim.config, "use_distributed_optimizer", None) if recipe.optim else None
    return Plan(
        ranks=count,
        gpus_per_node=int(recipe.trainer.devices),
        tensor=tensor,
        pipeline=pipeline,
        virtual=strategy.virtual_pipeline_model_parallel_size or 1,
        context=strategy.context_parallel_size,
        expert=strategy.expert_model_parallel_size,
        expert_tensor=strategy.expert_tensor_parallel_size or tensor,
        sequence_parallel=bool(strategy.sequence_parallel),
        half=half and getattr(recipe.trainer.plugins, "on_gpu", "bf16-mixed") != "32",
        distributed_optimizer=half if optimizer is None else bool(optimizer),
        recompute_all=getattr(config, "recompute_granularity", None) == "full",
        adapter_rank=recipe.peft.dim if recipe.peft else None,
        reference={"AdaptersOff": "adapters_off"}.get(kind, kind.lower()),
        micro_tokens=micro,
        longest=longest,
        sequences=data.global_batch_size * responses,
        sequences_per_micro=per_micro * responses,
    )


def _engine(generate: Any) -> dict[str, int]:
    engine = generate.engine
    return {
        "kv_sequences": getattr(engine, "batch_size", 0),
        "kv_tensor": getattr(engine, "tensor_model_parallel_size", 1),
    }


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the sequences of a file, in tokens at four characters each."""

    rows: int
    mean: float
    longest: float


def lengths(recipe: Any) -> Lengths | None:
    """Of the rows that a recipe trains on; None if they are not there yet.

    Raises:
        RowError: a row cannot be read.
    """
    train = recipe.data.train
    if not train or isinstance(train, run.Partial):
        return None
    try:
        files = [part.path for part in sources.parts(train, "data.train")]
    except RowError:
        return None
    rows, found = 0, []
    lines = itertools.chain.from_iterable(chunk.texts() for file in files for chunk in sources.chunks(file))
    for rows, (line, source) in enumerate(lines, start=1):
        if rows <= SAMPLE:
            found += [size for row in parse_line(line, source) for size in _sizes(row)]
    return Lengths(rows, sum(found) / len(found), max(found)) if found else None


def _sizes(row: Any) -> list[float]:
    responses = (row.chosen_response, row.rejected_response) if isinstance(row, PreferenceRow) else (row.response,)
    return [(_characters(row.prompt) + _characters(response)) / CHARACTERS for response in responses]


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


# ---- as text ------------------------------------------------------------------------------------------------------


def _head(recipe: Any, model: anatomy.Anatomy, plan: Plan, card: GPU) -> str:
    name = recipe.log.name if hasattr(recipe, "log") else recipe.output
    return (
        f"{name}: {model.parameters / 1e9:.3g} billion parameters, {model.active / 1e9:.3g} billion of them multiply a "
        f"token\non {plan}"
    )


def _memory(model: anatomy.Anatomy, plan: Plan, card: GPU) -> str:
    found = _table(f"memory of the fullest {'GPU' if card.peak else 'rank'}", sizing.memory(model, plan), card)
    if sizing.total(model, plan) <= card.memory:
        return found
    other = sizing.proposal(model, plan, card) if card.peak else None
    if other is None:
        return f"{found}\nOUT OF MEMORY"
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
    written = " ".join(f"{name}={'null' if value is None else value}" for name, value in settings.items())
    needs = sizing.total(model, other) / 1e9
    return f"{found}\nOUT OF MEMORY. What fits ({needs:.0f} GB), on {other}:\n  {written}"


def _answering(model: anatomy.Anatomy, plan: Plan, card: GPU) -> str:
    return _table(f"while it writes {plan.kv_sequences} answers at a time", sizing.answering(model, plan), card)


def _table(title: str, parts: dict[str, float], card: GPU) -> str:
    width = max(40, len(title) + 2)
    lines = [f"{title:<{width}}{'GB':>8}", "-" * (width + 8)]
    lines += [f"{name:<{width}}{value / 1e9:>8.2f}" for name, value in parts.items() if value]
    lines.append("-" * (width + 8))
    lines.append(
        f"{'of ' + format(card.memory / 1e9, '.0f') + ' (' + card.name + ')':<{width}}{sum(parts.values()) / 1e9:>8.2f}"
    )
    return "\n".join(lines)


def _time(
    recipe: Any, model: anatomy.Anatomy, plan: Plan, card: GPU, mfu: float, tokens: float | None, data: Lengths | None
) -> str:
    mean = tokens or (min(data.mean, plan.longest) if data else plan.longest)
    why = "as given" if tokens else "of data.train, at four characters each" if data else "data.seq_length"
    epochs = _limit(recipe.trainer.max_epochs) or 1
    seconds = sizing.step_seconds(model, plan, card, mfu=mfu, length=mean, epochs=epochs)
    each = plan.sequences * mean / seconds / plan.ranks
    lines = [
        f"time at {mfu:.0%} of {card.peak / 1e12:.0f} TFLOP/s, {mean:,.0f} tokens a sequence ({why})",
        f"  a step of {plan.sequences} sequences  {seconds:.3g} s, {plan.micro_batches} micro-batches a rank"
        + (f", {sizing.bubble(plan):.0%} more for the pipeline to fill" if plan.pipeline > 1 else ""),
        f"  tokens a second  {each:,.0f} a GPU, {each * plan.ranks:,.0f} in all",
    ]
    steps = _steps(recipe, data)
    if steps:
        hours = steps * seconds / 3600
        lines.append(f"  {steps:,} steps  {hours:.3g} h, {hours * plan.ranks:,.3g} GPU-hours")
    else:
        lines.append("  how many steps is not known: data.train is not here, and trainer.max_steps not set")
    return "\n".join(lines)


def _limit(value: int | None) -> int | None:
    """Of steps or epochs; Lightning's -1 is none."""
    return value if (value or -1) > 0 else None


def _steps(recipe: Any, data: Lengths | None) -> int | None:
    most = _limit(recipe.trainer.max_steps)
    if data is None:
        return most
    epochs = _limit(recipe.trainer.max_epochs)
    of_data = None if epochs is None else data.rows // recipe.data.global_batch_size * epochs
    return min((n for n in (most, of_data) if n is not None), default=None)
