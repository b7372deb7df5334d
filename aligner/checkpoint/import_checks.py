"""Checks of Hugging Face models: settings that NeMo's importers silently ignore."""

from __future__ import annotations

from typing import Any

from aligner.common.errors import CheckpointError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Rotary scaling of NeMo's Llama 3.1; any factor is supported."""
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}
ASSUMED: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "mistral": PLAIN,
    "mixtral": PLAIN,
    "nemotron": {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu"},
    "qwen3": {"head_dim": 128, **PLAIN},
    "qwen3_moe": {"head_dim": 128, **EXPERTS, **PLAIN, "mlp_only_layers": []},
    "gemma2": {"head_dim": 256},
}
"""Values that NeMo's importers assume, by model_type."""


def check(name: str, config: dict[str, Any]) -> None:
    """Refuse a Hugging Face model that the import would alter.

    Args:
        name: name of the model, for messages.
        config: content of its config.json.

    Raises:
        CheckpointError: NeMo's importer ignores a setting of the model.
    """
    kind = config["model_type"]
    _check_rotary(name, kind, config.get("rope_scaling"))
    window = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if window and kind in ("mixtral", "qwen2", "qwen3", "qwen3_moe"):
        raise CheckpointError(
            f"source: {name} has sliding_window {config['sliding_window']}, which NeMo's importer of {kind} ignores"
        )
    for field, value in ASSUMED.get(kind, {}).items():
        if config.get(field, value) != value:
            raise CheckpointError(
                f"source: {name} has {field} {config[field]!r}, and NeMo's importer of {kind} knows {value!r} alone"
            )


def rows(name: str, *, stored: int, vocabulary: int) -> None:
    """Refuse an import with a padded vocabulary: the padding would take part in every softmax.

    Raises:
        CheckpointError: the importer padded the vocabulary.
    """
    if stored != vocabulary:
        raise CheckpointError(
            f"source: {name} has {vocabulary} tokens, which NeMo's importer padded to {stored}, and the padding would "
            f"take probability from every token; resize its embeddings to {stored} first "
            "(transformers: model.resize_token_embeddings)"
        )


def _check_rotary(name: str, kind: str, scaling: dict[str, Any] | None) -> None:
    if not scaling or scaling.get("rope_type", scaling.get("type")) == "default":
        return
    known = kind == "llama" and scaling.get("rope_type") == "llama3"
    if not known or any(scaling.get(field, value) != value for field, value in LLAMA3.items()):
        raise CheckpointError(
            f"source: {name} has rope_scaling {scaling!r}, which NeMo's importer of {kind} ignores or knows only as "
            f"rope_type 'llama3' with {LLAMA3}"
        )
