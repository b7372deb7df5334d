"""Architecture checks: a recipe's model config must match the checkpoint that provides its weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from aligner.backend import safe_reading
from aligner.backend.safe_reading import CONTEXT_PATH, WEIGHTS_PATH
from aligner.common import trust
from aligner.common.console import log_rank0
from aligner.common.errors import CheckpointError
from aligner.model.adapters import base_of

# Fields of NeMo's GPT configs that determine the model's function for given weights; a run may change all others.
FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "activation_func",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "seq_len_interpolation_factor",
    "scale_factor",
    "low_freq_factor",
    "high_freq_factor",
    "old_context_len",
    "share_embeddings_and_output_weights",
    "num_moe_experts",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "moe_ffn_hidden_size",
    "window_size",
)


def match_checkpoint(model: Any, start: Path, *, update: bool) -> None:
    """Compare a recipe's model with the model of a checkpoint.

    With `update` (the checkpoint was imported from Hugging Face, or belongs to the run), the recipe adopts and logs
    differing fields; one recipe then covers all models of a family. Without `update`, a difference is an error.

    Raises:
        CheckpointError: the checkpoint has another model class, fields unknown to the recipe's config class, or
            differing fields without `update`.
    """
    trust.know([model, model.config, getattr(model, "tokenizer", None)])
    saved: Any = safe_reading.load_context(start / CONTEXT_PATH, "model")
    if type(saved).__name__ != type(model).__name__:
        raise CheckpointError(
            f"model: the recipe builds a {type(model).__name__}, but {start} holds a {type(saved).__name__}; use the "
            "recipe of that model"
        )
    if hasattr(model.config, "scale_factor") and not hasattr(saved.config, "scale_factor"):
        # NeMo's Llama 3.1 always scales rotary angles; a factor of 1 means no scaling.
        saved.config.scale_factor = 1.0
    differ = {
        name: (getattr(model.config, name), getattr(saved.config, name))
        for name in FIELDS
        if hasattr(saved.config, name) and getattr(model.config, name, None) != getattr(saved.config, name)
    }
    # No effect on the model after `match_vocab_size`, but exporters read these fields.
    for name in ("make_vocab_size_divisible_by", "vocab_size"):
        for config in (model.config, model.__io__.config):
            setattr(config, name, getattr(saved.config, name, None))
    if not differ:
        return
    foreign = [name for name in differ if not hasattr(model.config, name)]
    if foreign:
        raise CheckpointError(
            f"model.config: {start} holds a {type(saved.config).__name__} with {', '.join(foreign)}, which the "
            f"recipe's {type(model.config).__name__} does not know; set model.config to a run.Config of that class"
        )
    differences = ", ".join(f"{name} {theirs!r} (recipe: {ours!r})" for name, (ours, theirs) in differ.items())
    if not update:
        raise CheckpointError(
            f"model.config: does not fit {start}, which has {differences}; set these fields, or start from another"
        )
    log_rank0(f"model: taken from the checkpoint: {differences}")
    for name, (_, theirs) in differ.items():
        setattr(model.config, name, theirs)
        # `__io__` is saved with the run's checkpoints and read at export.
        setattr(model.__io__.config, name, theirs)


def architecture_hash(config: Any) -> str:
    """Hash the fields that determine a model's function: equal weights may still give different functions."""
    fields = {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}
    texts = {name: getattr(value, "__name__", str(value)) for name, value in fields.items()}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def match_vocab_size(model: Any, checkpoint: Path, *, tensor_model_parallel_size: int) -> None:
    """Set the model's vocabulary rows to the checkpoint's number of rows.

    Megatron pads the vocabulary to a multiple that grows with tensor parallelism, and the softmax includes the padding.
    Under another tensor-parallel size, additional untrained rows would take probability from every token: the same
    weights would be a different policy.

    Raises:
        CheckpointError: the checkpoint's rows cannot be divided over the tensor-parallel ranks.
    """
    rows = vocabulary_rows(checkpoint)
    if rows is None:
        base = base_of(checkpoint)
        if base is not None:
            match_vocab_size(model, base, tensor_model_parallel_size=tensor_model_parallel_size)
        return
    if rows % tensor_model_parallel_size:
        raise CheckpointError(
            f"trainer.strategy.tensor_model_parallel_size: {tensor_model_parallel_size} ranks cannot share the {rows} "
            f"vocabulary rows of {checkpoint} evenly; use a divisor of {rows}"
        )
    model.config.vocab_size = rows


def vocabulary_rows(checkpoint: Path) -> int | None:
    """Return the number of embedding rows of a checkpoint; None for one without embedding, as adapters alone."""
    stored: dict[str, Any] = safe_reading.read_metadata(checkpoint / WEIGHTS_PATH).state_dict_metadata
    rows = (meta.size[0] for name, meta in stored.items() if name.endswith("embedding.word_embeddings.weight"))
    return next(rows, None)
