"""Whether a model can be divided as it is asked to be; a refusal names what works instead."""

from __future__ import annotations

import math
from typing import Any

from aligner.backend import device
from aligner.common.errors import ConfigError

STRATEGY = "trainer.strategy"


def check(parallel: Any, config: Any, *, ranks: int) -> None:
    """Compare a strategy's parallelism with the model that it is to divide.

    Raises:
        ConfigError: Megatron would fail on it, or do it wrong.
    """
    _tensor(parallel, config)
    _pipeline(parallel, config)
    _experts(parallel, config, ranks)
    _context(parallel, config)


def multiples(parallel: Any) -> dict[str, int]:
    """What lengths and counts must be divisible by: sequences, rows, and the micro-batches of a step on a rank."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    # Context parallelism gives every rank two pieces of each sequence.
    multiple = 2 * context if context > 1 else 1
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "multiple": multiple,
        "row_multiple": math.lcm(multiple, (tensor if parallel.sequence_parallel else 1) * context),
        "every": parallel.microbatch_group_size_per_vp_stage or 1 if interleaved else 1,
    }


def _tensor(parallel: Any, config: Any) -> None:
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        raise ConfigError(
            f"{STRATEGY}.sequence_parallel: True divides what tensor parallelism leaves whole, and "
            "tensor_model_parallel_size is 1; set it to False, or tensor_model_parallel_size=2"
        )
    groups = config.num_query_groups or config.num_attention_heads
    for name, value in (
        ("num_attention_heads", config.num_attention_heads),
        ("num_query_groups", groups),
        ("ffn_hidden_size", config.ffn_hidden_size),
    ):
        if value % tensor:
            raise ConfigError(
                f"{STRATEGY}.tensor_model_parallel_size: {tensor} ranks cannot share model.config.{name}={value} "
                f"evenly; use {_nearest(tensor, config.num_attention_heads, groups, config.ffn_hidden_size)}"
            )


def _pipeline(parallel: Any, config: Any) -> None:
    stages, layers = parallel.pipeline_model_parallel_size, config.num_layers
    chunks, group = parallel.virtual_pipeline_model_parallel_size, parallel.microbatch_group_size_per_vp_stage
    if chunks is not None and (chunks < 2 or stages == 1):
        raise ConfigError(
            f"{STRATEGY}.virtual_pipeline_model_parallel_size: {chunks} with pipeline_model_parallel_size={stages}, "
            "and only the stages of a pipeline can be interleaved, two or more a rank; set it to None, or both to 2"
        )
    if chunks is not None and group is not None and group < stages:
        raise ConfigError(
            f"{STRATEGY}.microbatch_group_size_per_vp_stage: {group}, but pipeline_model_parallel_size is {stages}, "
            "and a group has a micro-batch for each stage; set it to None"
        )
    if parallel.pipeline_model_parallel_layout is not None:
        return
    chunks = chunks or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    left, between = layers - (first or 0) - (last or 0), stages - (first is not None) - (last is not None)
    counted = ""
    for name in ("embedding", "loss"):
        if getattr(parallel, f"account_for_{name}_in_pipeline_split"):
            left, counted = left + 1, f"{counted} with the {name} as one"
    if between < 0 or left < between or (between == 0 and left) or (between and left % (between * chunks)):
        ends = "" if first is None and last is None else " that the first and the last stage leave"
        wanted = f"{between} x {chunks}" if chunks > 1 else str(max(0, between))
        even = f"; use {_nearest(stages * chunks, layers)} stages in all" if between == stages and not counted else ""
        raise ConfigError(
            f"{STRATEGY}.pipeline_model_parallel_size: the {left} layers{counted}{ends} cannot be divided over "
            f"{wanted} stages{even}, or change num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage, which make a split uneven"
        )
    if (first or 0) % chunks or (last or 0) % chunks:
        raise ConfigError(
            f"{STRATEGY}.num_layers_in_first_pipeline_stage: {first}, and in the last one {last}; each must be a "
            f"multiple of virtual_pipeline_model_parallel_size={chunks}"
        )


def _experts(parallel: Any, config: Any, ranks: int) -> None:
    experts, over = getattr(config, "num_moe_experts", None), parallel.expert_model_parallel_size
    tensor = parallel.tensor_model_parallel_size
    if over > 1 and not experts:
        raise ConfigError(
            f"{STRATEGY}.expert_model_parallel_size: {over}, but the model is no mixture of experts; set it to 1"
        )
    if not experts:
        return
    if experts % over:
        raise ConfigError(
            f"{STRATEGY}.expert_model_parallel_size: {over} ranks cannot share {experts} experts evenly; use "
            f"{_nearest(over, experts)}"
        )
    within = over * (parallel.expert_tensor_parallel_size or tensor) * parallel.pipeline_model_parallel_size
    if ranks % within:
        raise ConfigError(
            f"{STRATEGY}.expert_model_parallel_size: {ranks} ranks cannot be divided into groups of {within} (experts "
            "times expert_tensor_parallel_size times pipeline_model_parallel_size); use a smaller one, or "
            "expert_tensor_parallel_size=1"
        )
    if tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"{STRATEGY}.sequence_parallel: False, but Megatron divides a mixture of experts over tensor-parallel "
            "ranks with sequence parallelism only; set it to True"
        )


def _context(parallel: Any, config: Any) -> None:
    if parallel.context_parallel_size == 1:
        return
    asked = special_attention(config)
    if not device.no_transformer_engine():
        # What Transformer Engine has no kernel for, and NeMo's own attention does not divide.
        asked = [name for name in asked if name == "attn_logit_softcapping"]
    if asked:
        raise ConfigError(
            f"{STRATEGY}.context_parallel_size: {parallel.context_parallel_size}, but the model asks for "
            f"{', '.join(asked)}, which is not divided over ranks here; set it to 1, and tensor_model_parallel_size "
            "instead" + (", or install transformer-engine on a GPU" if device.no_transformer_engine() else "")
        )


def special_attention(config: Any) -> list[str]:
    """What a model asks of attention that torch's own does not know."""
    special = {
        "window_size": getattr(config, "window_size", None),
        "softmax_type": None if getattr(config, "softmax_type", "vanilla") == "vanilla" else config.softmax_type,
        "multi_latent_attention": getattr(config, "multi_latent_attention", False),
        "apply_query_key_layer_scaling": getattr(config, "apply_query_key_layer_scaling", False),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
    }
    return [name for name, value in special.items() if value]


def _nearest(wanted: int, *sizes: int) -> int:
    """The common divisor of sizes that is nearest to what was wanted, the smaller of two."""
    return min(
        (n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)), key=lambda n: abs(n - wanted)
    )
