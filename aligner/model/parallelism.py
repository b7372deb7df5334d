"""Checks of parallel sizes against a model; error messages name valid sizes."""

from __future__ import annotations

import math
from typing import Any

from aligner.backend import device
from aligner.common.errors import ConfigError

STRATEGY = "trainer.strategy"


def check(parallel: Any, config: Any, *, ranks: int) -> None:
    """Check a strategy's parallel sizes against the model.

    Raises:
        ConfigError: Megatron would fail, or compute wrong results, with these sizes.
    """
    _check_tensor(parallel, config)
    _check_pipeline(parallel, config)
    _check_experts(parallel, config, ranks)
    _check_context(parallel, config)


def multiples(parallel: Any) -> dict[str, int]:
    """Compute the divisors of sequence lengths, row lengths, and a rank's micro-batches per step."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    # Under context parallelism, every rank has two pieces of each sequence.
    multiple = 2 * context if context > 1 else 1
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "multiple": multiple,
        "row_multiple": math.lcm(multiple, (tensor if parallel.sequence_parallel else 1) * context),
        "microbatch_multiple": parallel.microbatch_group_size_per_vp_stage or 1 if interleaved else 1,
    }


def _check_tensor(parallel: Any, config: Any) -> None:
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
                f"evenly; use {_divisor(tensor, config.num_attention_heads, groups, config.ffn_hidden_size)}"
            )


def _check_pipeline(parallel: Any, config: Any) -> None:
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
        expected = f"{between} x {chunks}" if chunks > 1 else str(max(0, between))
        even = f"; use {_divisor(stages * chunks, layers)} stages in all" if between == stages and not counted else ""
        raise ConfigError(
            f"{STRATEGY}.pipeline_model_parallel_size: the {left} layers{counted}{ends} cannot be divided over "
            f"{expected} stages{even}, or change num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage, which make a split uneven"
        )
    if (first or 0) % chunks or (last or 0) % chunks:
        raise ConfigError(
            f"{STRATEGY}.num_layers_in_first_pipeline_stage: {first}, and in the last one {last}; each must be a "
            f"multiple of virtual_pipeline_model_parallel_size={chunks}"
        )


def _check_experts(parallel: Any, config: Any, ranks: int) -> None:
    experts, ep = getattr(config, "num_moe_experts", None), parallel.expert_model_parallel_size
    tensor = parallel.tensor_model_parallel_size
    if ep > 1 and not experts:
        raise ConfigError(
            f"{STRATEGY}.expert_model_parallel_size: {ep}, but the model is no mixture of experts; set it to 1"
        )
    if not experts:
        return
    if experts % ep:
        raise ConfigError(
            f"{STRATEGY}.expert_model_parallel_size: {ep} ranks cannot share {experts} experts evenly; use "
            f"{_divisor(ep, experts)}"
        )
    group = ep * (parallel.expert_tensor_parallel_size or tensor) * parallel.pipeline_model_parallel_size
    if ranks % group:
        raise ConfigError(
            f"{STRATEGY}.expert_model_parallel_size: {ranks} ranks cannot be divided into groups of {group} (experts "
            "times expert_tensor_parallel_size times pipeline_model_parallel_size); use a smaller one, or "
            "expert_tensor_parallel_size=1"
        )
    if tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"{STRATEGY}.sequence_parallel: False, but Megatron divides a mixture of experts over tensor-parallel "
            "ranks with sequence parallelism only; set it to True"
        )


def _check_context(parallel: Any, config: Any) -> None:
    if parallel.context_parallel_size == 1:
        return
    names = special_attention(config)
    if not device.no_transformer_engine():
        # Transformer Engine has no kernel for it, and NeMo's own attention does not support context parallelism.
        names = [name for name in names if name == "attn_logit_softcapping"]
    if names:
        raise ConfigError(
            f"{STRATEGY}.context_parallel_size: {parallel.context_parallel_size}, but the model asks for "
            f"{', '.join(names)}, which is not divided over ranks here; set it to 1, and tensor_model_parallel_size "
            "instead" + (", or install transformer-engine on a GPU" if device.no_transformer_engine() else "")
        )


def special_attention(config: Any) -> list[str]:
    """List a model's attention settings that torch's attention does not support."""
    special = {
        "window_size": getattr(config, "window_size", None),
        "softmax_type": None if getattr(config, "softmax_type", "vanilla") == "vanilla" else config.softmax_type,
        "multi_latent_attention": getattr(config, "multi_latent_attention", False),
        "apply_query_key_layer_scaling": getattr(config, "apply_query_key_layer_scaling", False),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
    }
    return [name for name, value in special.items() if value]


def _divisor(wanted: int, *sizes: int) -> int:
    """Return the common divisor of `sizes` nearest to `wanted`; the smaller one of a tie."""
    return min(
        (n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)), key=lambda n: abs(n - wanted)
    )
