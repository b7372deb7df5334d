"""Checks of Hugging Face models: every key of their configuration is read, assumed, or known to change nothing.

NeMo's importers read some keys, assume the values of others, and ignore the rest. A key that is in none of the lists
below may change what the model computes, so a model that has it is refused.
"""

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
    "gemma2": {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
}
"""Values that NeMo's importers assume, by model_type."""

READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "torch_dtype", "dtype",
    "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "sliding_window", "use_sliding_window", "layer_types",
}  # fmt: skip
"""Keys that the importers read, or that `check` compares."""
READ_BY_KIND: dict[str, set[str]] = {
    "mixtral": {"num_local_experts", "num_experts_per_tok"},
    "nemotron": {"norm_eps", "partial_rotary_factor"},
    "qwen3_moe": {"moe_intermediate_size"},
    "gemma2": {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "hidden_act"},
}
HARMLESS = {
    # What the file is.
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash",
    "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version", "tokenizer_class",
    # How it is run, without another result.
    "use_cache", "pretraining_tp", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_experts_implementation", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "use_bfloat16", "max_window_layers", "cache_implementation", "max_sequence_length", "tokenizer_model_max_length",
    "tokenizer_padding_side",
    # Training.
    "attention_dropout", "hidden_dropout", "router_aux_loss_coef", "router_jitter_noise",
    # Generation, which generation_config.json takes precedence over.
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "min_length", "max_new_tokens", "do_sample",
    "num_beams", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "num_return_sequences", "num_beam_groups", "diversity_penalty",
    # Heads for classification, which are not imported.
    "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
}  # fmt: skip
"""Keys that do not change the logits of an imported model."""
OFF: list[Any] = [None, False, "", [], {}]
"""Values with which a key switches nothing on."""


def as_transformers_4(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys of transformers 4, which NeMo's importers read.

    transformers 5 writes the rotary base and scaling as `rope_parameters`, and the precision as `dtype`.

    Raises:
        CheckpointError: the rotary embedding differs between layers, or is given twice.
    """
    config = dict(config)
    if "torch_dtype" not in config and "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.pop("rope_parameters", None)
    if not rope:
        return config
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(
            f"source: {name} has rope_parameters {rope!r}, one for each kind of layer, which NeMo's importers ignore"
        )
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    found: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if scaling.get("rope_type", "default") != "default":
        found["rope_scaling"] = scaling
    for key, value in found.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(
                f"source: {name} has {key} {config[key]!r}, and {value!r} in rope_parameters; correct config.json"
            )
        config[key] = value
    return config


def check(name: str, config: dict[str, Any]) -> None:
    """Refuse a Hugging Face model that the import would alter.

    Args:
        name: name of the model, for messages.
        config: content of its config.json.

    Raises:
        CheckpointError: NeMo's importer ignores a setting of the model, or has none for it.
    """
    config = as_transformers_4(name, config)
    kind = config.get("model_type", "")
    _check_rotary(name, kind, config.get("rope_scaling"))
    _check_window(name, kind, config)
    for field, value in ASSUMED.get(kind, {}).items():
        if config.get(field) not in (value, None):
            raise CheckpointError(
                f"source: {name} has {field} {config[field]!r}, and NeMo's importer of {kind} knows {value!r} alone"
            )
    if kind == "qwen2" and config.get("head_dim"):
        width = config["hidden_size"] // config["num_attention_heads"]
        if config["head_dim"] != width:
            raise CheckpointError(
                f"source: {name} has head_dim {config['head_dim']}, and NeMo's importer of qwen2 knows {width} alone "
                "(hidden_size / num_attention_heads)"
            )
    known = READ | HARMLESS | READ_BY_KIND.get(kind, set()) | set(ASSUMED.get(kind, ()))
    unknown = [key for key, value in config.items() if key not in known and value not in OFF]
    if unknown:
        shown = ", ".join(f"{key} {config[key]!r:.60}" for key in unknown)
        raise CheckpointError(
            f"source: {name} has {shown} in its config.json, which NeMo's importer of {kind} does not know; take out "
            "what does not change the logits, and import the rest with transformers"
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


def _check_window(name: str, kind: str, config: dict[str, Any]) -> None:
    window = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if window and kind in ("llama", "mixtral", "nemotron", "qwen2", "qwen3", "qwen3_moe"):
        raise CheckpointError(
            f"source: {name} has sliding_window {config['sliding_window']}, which NeMo's importer of {kind} ignores"
        )
    layers = config.get("layer_types") or []
    assumed = "sliding_attention" if kind == "mistral" and window else "full_attention"
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(layers))]
    if layers != (alternating if kind == "gemma2" else [assumed] * len(layers)):
        raise CheckpointError(f"source: {name} has layer_types {layers!r:.80}, which NeMo's importer of {kind} ignores")
