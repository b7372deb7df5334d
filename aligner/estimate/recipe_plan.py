"""Plan of a recipe: parallel sizes, batch sizes, precision and sequence lengths."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import nemo_run as run

from aligner.common.errors import ConfigError, RowError
from aligner.data import sources
from aligner.data.forms.form import Options
from aligner.data.rows import FormatCounts, PreferenceRow, TextOrMessages
from aligner.estimate.memory import GPU, GPUS, Plan

SAMPLE = 2000
"""Rows that a file's lengths are taken from."""
REFERENCES = {
    "CachedReference": "cached",
    "FrozenReference": "frozen",
    "BaseModelReference": "base_model",
    "SyncedReference": "synced",
}
"""Class -> `Plan.reference`; others are taken to keep no copy of the weights, and to score each step."""
CHARACTERS = 4
"""Assumed characters per token, because no tokenizer is loaded."""


def this_machine(ranks: int) -> GPU:
    """Return this machine's GPU; without a GPU, the machine's memory divided by the ranks of a run."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return GPU("memory of this machine a rank", psutil.virtual_memory().total / ranks, 0.0)
    properties = torch.cuda.get_device_properties(0)
    matches = (gpu for gpu in GPUS.values() if gpu.name.upper() in properties.name.upper())
    return GPU(properties.name, properties.total_memory, next(matches, GPUS["h100"]).peak)


def training_recipe(recipe: Any) -> Any:
    """Return the recipe of `align`: the argument itself, or that of the first iteration."""
    return recipe.iterations[0].align if hasattr(recipe, "iterations") else recipe


def num_ranks(recipe: Any) -> int:
    """Return the number of ranks of a recipe."""
    trainer = training_recipe(recipe).trainer
    return int(trainer.num_nodes or 1) * int(trainer.devices)


def plan_of(recipe: Any, *, mixed_precision: bool) -> Plan:
    """Return the plan of a recipe of `align`."""
    strategy, data, config = recipe.trainer.strategy, recipe.data, recipe.model.config
    tensor, pipeline = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    loss = getattr(recipe, "loss", None)
    single = (
        not recipe.preference_loss_weight
        or getattr(loss, "__fn_or_cls__", loss).__module__ == "aligner.losses.unpaired"
    )
    responses = 1 if single else 2
    count, model_parallel = num_ranks(recipe), tensor * pipeline * strategy.context_parallel_size
    if count % model_parallel:
        raise ConfigError(
            f"trainer.num_nodes, trainer.devices: {count} ranks cannot be divided into groups of {model_parallel} "
            "(tensor x pipeline x context parallelism of trainer.strategy); give a multiple of it, or "
            "divide the model less"
        )
    micro_batch_size, longest = data.micro_batch_size, data.seq_length
    packed = data.batching == "packed"
    micro_tokens = (
        micro_batch_size * (data.packed_sequence_size or responses * longest)
        if packed
        else micro_batch_size * responses * longest
    )
    reference = getattr(recipe, "reference", None)
    kind = "none"
    if reference is not None and recipe.preference_loss_weight:
        kind = REFERENCES.get(reference.__fn_or_cls__.__name__, "base_model")
    if getattr(reference, "cpu_offload", False):
        # The copy is in the host's memory; the forward pass is made all the same.
        kind = "base_model"
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
        mixed_precision=mixed_precision and getattr(recipe.trainer.plugins, "gpu_precision", "bf16-mixed") != "32",
        distributed_optimizer=mixed_precision if optimizer is None else bool(optimizer),
        recompute_all=getattr(config, "recompute_granularity", None) == "full",
        adapter_rank=recipe.peft.dim if recipe.peft else None,
        reference=kind,
        micro_tokens=micro_tokens,
        longest=longest,
        sequences=data.global_batch_size * responses,
        sequences_per_micro=micro_batch_size * responses,
    )


def engine_sizes(generate: Any) -> dict[str, int]:
    engine = generate.engine
    return {
        "kv_sequences": getattr(engine, "batch_size", 0),
        "kv_tensor": getattr(engine, "tensor_model_parallel_size", 1),
    }


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Sequence lengths of data files in tokens, at four characters each; `rows` counts all rows."""

    rows: int
    mean: float
    longest: float


def lengths(recipe: Any) -> Lengths | None:
    """Return the sequence lengths of a recipe's training rows; None if the rows do not exist yet.

    Raises:
        RowError: a row is invalid.
    """
    train = recipe.data.train
    if not train or isinstance(train, run.Partial):
        return None
    try:
        files = [part.path for part in sources.resolve_files(train, "data.train")]
    except RowError:
        return None
    rows, token_counts, options = 0, [], Options(recipe.data.ranked_pairs, tuple(recipe.data.ignore_columns or ()))
    for file in files:
        reader, counts = sources.reader_of(file, options), FormatCounts()
        lines = list(itertools.chain.from_iterable(chunk.texts() for chunk in sources.chunks(file)))
        found = reader.rows(lines[: max(0, SAMPLE - rows)], counts)
        token_counts += [size for row in found for size in _sequence_lengths(row)]
        rows += len(lines)
    return Lengths(rows, sum(token_counts) / len(token_counts), max(token_counts)) if token_counts else None


def _sequence_lengths(row: Any) -> list[float]:
    responses = (row.chosen_response, row.rejected_response) if isinstance(row, PreferenceRow) else (row.response,)
    return [(_count_characters(row.prompt) + _count_characters(response)) / CHARACTERS for response in responses]


def _count_characters(text: TextOrMessages) -> int:
    return len(text) if isinstance(text, str) else sum(len(message.get("content") or "") for message in text)
