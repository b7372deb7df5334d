"""Config, weights and tokenizer of NeMo 1's `.nemo` archives, converted to Megatron-Core.

Weights have two layouts. Before Megatron-Core (GPT-2B-001), NeMo 1 wrote flat state dicts by rank. Its later versions
(`mcore_gpt: true`) wrote distributed checkpoints, whose names are today's but for a prefix.

Weights are [out, in]. The old rows of queries, keys and values are [q; k; v] per head, which is Megatron-Core's order
without grouped queries. Rows of a fused gated MLP are [gate; up], as in Megatron-Core.
"""

from __future__ import annotations

import dataclasses
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from aligner.backend import loading
from aligner.common.errors import CheckpointError

CONFIG, FLAT, DISTRIBUTED = "model_config.yaml", "model_weights.ckpt", "model_weights"
RANKS = re.compile(r"(?:tp_rank_(\d+)_pp_rank_(\d+)|mp_rank_(\d+))$")
MODULES = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
"""Modules of a layer: old name -> name in Megatron-Core's local layers."""
ROWS = ("query_key_value", "dense_h_to_4h", "dense_h_to_4h_2", "word_embeddings", "output_layer")
"""Modules that tensor-parallel ranks divided by rows; `COLUMNS` by columns. Every rank had the others whole."""
COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
REFUSED: dict[str, Callable[[Any], bool]] = {
    "transformer_engine": bool,
    "transformer_block_type": lambda value: value != "pre_ln",
    "attention_type": lambda value: value != "multihead",
    "headscale": bool,
    "position_embedding_type": lambda value: value not in ("rope", "learned_absolute"),
    "num_moe_experts": lambda value: (value or 1) > 1,
}
"""Unsupported settings: the names of the flat layout above do not cover them."""
PLAIN = {
    "num_layers": None,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
    "make_vocab_size_divisible_by": 128,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
}
"""Fields of NeMo 2's GPTConfig with the same name in NeMo 1 -> NeMo 1's default."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """An unpacked archive."""

    folder: Path
    config: dict[str, Any]

    @property
    def distributed(self) -> Path | None:
        """Folder of the weights, if they are a distributed checkpoint."""
        weights = self.folder / DISTRIBUTED
        return weights if weights.is_dir() else None

    @property
    def tokenizer(self) -> Path:
        """Path of the SentencePiece model.

        Raises:
            CheckpointError: the archive has no SentencePiece model.
        """
        settings = self.config.get("tokenizer") or {}
        name = str(settings.get("model") or settings.get("tokenizer_model") or "").removeprefix("nemo:")
        file = (self.folder / name).resolve()
        inside = file.is_relative_to(self.folder.resolve()) and file.is_file()
        if settings.get("library") != "sentencepiece" or not name or not inside:
            raise CheckpointError(
                f"{CONFIG}: tokenizer: is {settings}; expected library sentencepiece, and its model in the archive"
            )
        return file


def is_archive(path: str | Path) -> bool:
    """Return whether a path is a `.nemo` archive, or the folder of an unpacked one."""
    source = Path(path).expanduser()
    return (source.is_file() and source.suffix == ".nemo") or (source / CONFIG).is_file()


def unpack(path: Path, scratch: Path) -> Archive:
    """Open an archive; a packed one is unpacked into `scratch`.

    Raises:
        CheckpointError: `path` is not an archive of a model.
    """
    folder = path
    if path.is_file():
        folder = scratch
        try:
            with tarfile.open(path) as packed:
                packed.extractall(scratch, filter=_without_links)
        except (tarfile.TarError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be unpacked: {error}") from None
    if not (folder / CONFIG).is_file():
        contents = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise CheckpointError(f"{path}: has no {CONFIG}; expected a .nemo archive of a GPT model; found {contents}")
    loading.check_zarr(folder / DISTRIBUTED)
    config = yaml.safe_load((folder / CONFIG).read_text())
    return Archive(folder, config.get("model", config))


def _without_links(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """Skip links: an archive has none, and a link can point out of its folder."""
    return None if member.issym() or member.islnk() else tarfile.data_filter(member, path)


def config_fields(config: dict[str, Any], *, rows: int, distributed: bool = False) -> dict[str, Any]:
    """Convert an archive's `model_config.yaml` to fields of NeMo 2's GPTConfig.

    Args:
        config: content of `model_config.yaml`.
        rows: rows of the stored vocabulary.
        distributed: whether the weights have today's names, which include Transformer Engine's.

    Raises:
        CheckpointError: Megatron-Core's GPT model has no counterpart of a setting.
    """
    for name, refuse in REFUSED.items():
        if distributed and name == "transformer_engine":
            continue
        if name in config and refuse(config[name]):
            raise CheckpointError(f"{CONFIG}: {name}: is {config[name]!r}, which cannot be imported")
    activation = str(config.get("activation", "gelu"))
    norm = str(config.get("normalization", "layernorm")).lower()
    if norm not in ("layernorm", "layernorm1p", "rmsnorm", "low_precision_layernorm"):
        raise CheckpointError(f"{CONFIG}: normalization: {norm!r} is not known")
    heads = config["num_attention_heads"]
    fields = {name: config.get(name, default) for name, default in PLAIN.items()}
    if fields["position_embedding_type"] == "learned_absolute":
        length = config.get("max_position_embeddings", 512)
    else:
        length = config.get("encoder_seq_length", 512)
    return fields | {
        "num_query_groups": config.get("num_query_groups") or heads,
        "kv_channels": config.get("kv_channels") or config["hidden_size"] // heads,
        "seq_length": length,
        "activation_func": _activation(activation.removeprefix("fast-"), bool(config.get("openai_gelu"))),
        "gated_linear_unit": activation.endswith("glu"),
        "normalization": "RMSNorm" if norm == "rmsnorm" else "LayerNorm",
        "layernorm_zero_centered_gamma": norm == "layernorm1p",
        "add_bias_linear": config.get("bias", True),
        "add_qkv_bias": config.get("qkv_bias", False),
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocab_size": rows,
    }


def _activation(name: str, openai_gelu: bool) -> Any:
    import torch.nn.functional as F
    from nemo.collections.llm.fn import activation

    known = {
        "gelu": activation.openai_gelu if openai_gelu else F.gelu,
        "geglu": F.gelu,
        "reglu": F.relu,
        "swiglu": F.silu,
        "squared-relu": activation.squared_relu,
    }
    if name not in known:
        raise CheckpointError(f"{CONFIG}: activation: {name!r} is not one of {', '.join(known)}")
    return known[name]


# ---- the flat layout ----------------------------------------------------------------------------------------------


def flat_weights(archive: Archive) -> dict[str, Tensor]:
    """Load and merge the weights of the flat layout under the names of Megatron-Core's local layers.

    Raises:
        CheckpointError: there are no weights, or Megatron-Core has no counterpart of one.
    """
    stages = _load_stages(archive.folder)
    layers_per_stage, weights = archive.config["num_layers"] // len(stages), {}
    for stage, shards in enumerate(stages):
        for key in shards[0]:
            tensor = _merge_shards(key, [shard[key] for shard in shards], archive.config)
            weights |= _rename(key, tensor, first=stage * layers_per_stage)
    for name in [name for name in weights if name.endswith(".second")]:
        # Two matrices of a gated MLP, gate and up.
        gate = name.removesuffix(".second")
        weights[gate] = torch.cat([weights[gate], weights.pop(name)])
    return weights


def _load_stages(folder: Path) -> list[list[dict[str, Tensor]]]:
    """Load the weights by pipeline stage and tensor-parallel rank."""
    files = sorted(folder.rglob(FLAT))
    if not files:
        raise CheckpointError(
            f"{folder}: has neither {FLAT} nor {DISTRIBUTED}/; expected the weights of a .nemo archive"
        )
    stages: dict[int, dict[int, dict[str, Tensor]]] = {}
    for file in files:
        match = RANKS.search(file.parent.name)
        tensor_rank, stage = (int(match[1] or match[3]), int(match[2] or 0)) if match else (0, 0)
        saved: Any = loading.weights_only(
            lambda file=file: torch.load(file, map_location="cpu", weights_only=True, mmap=True), str(file)
        )
        stages.setdefault(stage, {})[tensor_rank] = _weights(saved.get("state_dict", saved))
    return [[ranks[rank] for rank in sorted(ranks)] for _, ranks in sorted(stages.items())]


def _weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Remove prefixes, buffers, extra states and the last stage's copy of a tied embedding."""
    named = {re.sub(r"^model\.(module\.)?", "", key): value for key, value in state.items()}
    return {
        key.removeprefix("language_model."): value
        for key, value in named.items()
        if key.startswith("language_model.") and not key.endswith(("_extra_state", "inv_freq"))
    }


def _merge_shards(key: str, parts: list[Tensor], config: dict[str, Any]) -> Tensor:
    """Merge the shards of all tensor-parallel ranks into one tensor."""
    if config.get("megatron_legacy") and ".query_key_value." in key:
        # [3, heads, d] in each part.
        heads = config["num_attention_heads"] // len(parts)
        parts = [p.reshape(3, heads, -1, *p.shape[1:]).transpose(0, 1).reshape(p.shape) for p in parts]
    if key.endswith(COLUMNS):
        return torch.cat(parts, dim=1)
    if key.split(".")[-2] not in ROWS:
        if not all(torch.equal(parts[0], part) for part in parts):
            raise CheckpointError(f"{key}: ranks hold different copies of it; the archive is not whole")
        return parts[0]
    if ".dense_h_to_4h." in key and str(config.get("activation", "")).startswith("fast-"):
        # Each part has rows [gate; up].
        return torch.cat([half for halves in zip(*(p.chunk(2) for p in parts), strict=True) for half in halves])
    return torch.cat(parts)


def _rename(key: str, tensor: Tensor, *, first: int) -> dict[str, Tensor]:
    """Return the tensor under Megatron-Core's name; layers are counted from `first`."""
    if key.startswith("embedding.") or key == "output_layer.weight":
        return {key: tensor}
    if key.startswith("encoder.final_layernorm."):
        return {key.replace("encoder", "decoder", 1): tensor}
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+?)(_2)?\.(weight|bias)", key)
    if layer is None or layer[2] not in MODULES:
        raise CheckpointError(f"{key}: has no place in Megatron-Core's GPT model")
    name = f"decoder.layers.{int(layer[1]) + first}.{MODULES[layer[2]]}.{layer[4]}"
    return {f"{name}.second" if layer[3] else name: tensor}
