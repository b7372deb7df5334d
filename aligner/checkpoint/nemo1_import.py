"""Import of NeMo 1's `.nemo` archives as NeMo 2 checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.checkpoint import nemo1_archive
from aligner.common.errors import CheckpointError


def convert(source: Path, target: Path) -> None:
    """Write the model and tokenizer of an archive as a NeMo 2 checkpoint.

    Raises:
        CheckpointError: the archive holds no GPT model, or Megatron-Core has no counterpart of its model.
    """
    from nemo.collections import llm
    from nemo.lightning import io

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = nemo1_archive.unpack(source, Path(scratch))
        weights = None if archive.distributed else nemo1_archive.flat_weights(archive)
        rows = len(weights["embedding.word_embeddings.weight"]) if weights else _stored_rows(archive)
        fields = nemo1_archive.config_fields(archive.config, rows=rows, distributed=archive.distributed is not None)
        dtype = _dtype(archive, weights)
        config = llm.GPTConfig(**fields, params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
        model = llm.GPTModel(config, tokenizer=_tokenizer(archive, Path(scratch) / "tokenizer"))
        connector: Any = io.ModelConnector(str(source))
        trainer = connector.nemo_setup(model)
        if weights is not None:
            _load(model.module, {name: value.to(dtype) for name, value in weights.items()}, source)
        else:
            _load_distributed(model.module, archive, source)
        connector.nemo_save(target, trainer)


def _tokenizer(archive: nemo1_archive.Archive, folder: Path) -> Any:
    """Wrap the archive's SentencePiece model in a transformers tokenizer, which looks up every piece in that model."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from transformers import LlamaTokenizer

    special: dict[str, Any] = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"))
    LlamaTokenizer(
        str(archive.tokenizer),
        # Otherwise transformers adds a space and reads the model by protobuf, whose versions conflict.
        legacy=True,
        add_bos_token=False,
        **special | _special_tokens(archive.tokenizer),
    ).save_pretrained(folder)
    return AutoTokenizer(str(folder), use_fast=False)


def _special_tokens(model: Path) -> dict[str, Any]:
    """Return the special pieces of the SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(model))
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    return {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _load(core: Any, weights: dict[str, Tensor], source: Path) -> None:
    core.to(next(iter(weights.values())).dtype)
    if any(".linear_qkv.layer_norm_weight" in name for name in core.state_dict()):
        weights = {_fused_name(name): value for name, value in weights.items()}
    missing, unexpected = core.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing == [name for name in missing if name.endswith(("norm.bias", "norm_bias"))]:
        # In half precision, NeMo 1 omitted these biases if its linear layers had none.
        for name, parameter in core.named_parameters():
            if name in missing:
                torch.nn.init.zeros_(parameter)
        missing = []
    if missing or unexpected:
        raise CheckpointError(
            f"{source}: its weights do not fit the model that {nemo1_archive.CONFIG} describes; missing: "
            f"{', '.join(missing[:5]) or 'none'}; without a place: {', '.join(unexpected[:5]) or 'none'}"
        )


def _fused_name(name: str) -> str:
    """Return a norm's name in Transformer Engine's layers, where the next linear layer includes the norm."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def _load_distributed(core: Any, archive: nemo1_archive.Archive, source: Path) -> None:
    from megatron.core import dist_checkpointing

    core.to(_dtype(archive, None))
    sharded = core.sharded_state_dict(prefix="model.")
    sharded = {name: value for name, value in sharded.items() if not name.endswith("_extra_state")}
    try:
        loaded: Any = dist_checkpointing.load(sharded, str(archive.distributed))
    except Exception as error:
        raise CheckpointError(f"{source}: {nemo1_archive.DISTRIBUTED}/ cannot be read: {error}") from error
    weights = {name.removeprefix("model."): value for name, value in loaded.items() if name.startswith("model.")}
    _load(core, weights, source)


def _metadata(archive: nemo1_archive.Archive) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import load_tensors_metadata

    return load_tensors_metadata(str(archive.distributed))


def _stored_rows(archive: nemo1_archive.Archive) -> int:
    return _metadata(archive)["model.embedding.word_embeddings.weight"].global_shape[0]


def _dtype(archive: nemo1_archive.Archive, weights: dict[str, Tensor] | None) -> torch.dtype:
    """Return the dtype of the stored weights."""
    if weights:
        return weights["embedding.word_embeddings.weight"].dtype
    return _metadata(archive)["model.embedding.word_embeddings.weight"].dtype
