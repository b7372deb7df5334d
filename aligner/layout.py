"""Whether a model can be divided as it is asked to be; each refusal names the nearest division that works."""

from __future__ import annotations

from typing import Any

from aligner import cpu
from aligner.errors import ConfigError

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
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if chunks > 1 and stages == 1:
        raise ConfigError(
            f"{STRATEGY}.virtual_pipeline_model_parallel_size: {chunks} interleaves the stages of a pipeline, and "
            "pipeline_model_parallel_size is 1; set it to None, or pipeline_model_parallel_size=2"
        )
    first = getattr(parallel, "num_layers_in_first_pipeline_stage", None)
    last = getattr(parallel, "num_layers_in_last_pipeline_stage", None)
    asymmetric = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    if getattr(parallel, "pipeline_model_parallel_layout", None) or any(getattr(parallel, n, 0) for n in asymmetric):
        return
    left, between = layers - (first or 0) - (last or 0), stages - (first is not None) - (last is not None)
    if left < 0 or (between == 0 and left) or (between and left % (between * chunks)):
        uneven = "" if first is None and last is None else " after the first and the last stage have theirs"
        wanted = f"{between} x {chunks}" if chunks > 1 else str(between)
        raise ConfigError(
            f"{STRATEGY}.pipeline_model_parallel_size: {left} layers{uneven} cannot be divided over {wanted} "
            f"stages; use {_nearest(stages * chunks, layers)} stages in all, or num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage for an uneven split"
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
    if parallel.context_parallel_size == 1 or not cpu.no_transformer_engine():
        return
    asked = special_attention(config)
    if asked:
        raise ConfigError(
            f"{STRATEGY}.context_parallel_size: {parallel.context_parallel_size}, but the model asks for "
            f"{', '.join(asked)}, which without Transformer Engine is not divided over ranks; set it to 1, and "
            "tensor_model_parallel_size instead, or install transformer-engine on a GPU"
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
