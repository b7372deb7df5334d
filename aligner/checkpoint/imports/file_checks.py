"""Checks of the files of a Hugging Face model, in a second and without NeMo: weights that are whole, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligner.common.errors import CheckpointError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of which one holds the vocabulary."""
WEIGHTS = ("*.safetensors", "*.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Data types, as safetensors names them, that an importer can read."""


def check(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that an import could not read.

    Args:
        name: name of the model, for messages.
        folder: its folder.
        config: content of its config.json.

    Raises:
        CheckpointError: a file is missing, truncated, quantized or needs code of its own.
    """
    if config.get("auto_map"):
        raise CheckpointError(
            f"source: {name} needs code of its own (auto_map in config.json: {', '.join(config['auto_map'])}), which "
            "is not run; take a model that transformers knows"
        )
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"source: {name} has quantized weights ({method}), which cannot be trained; take the model in bfloat16"
        )
    for path in _weights(name, folder):
        _check_safetensors(name, path)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise CheckpointError(
            f"source: {name} has no tokenizer (none of {', '.join(TOKENIZERS)}); copy those of the model that it comes "
            "from beside its weights"
        )


def tokens_without_row(folder: Path, rows: int) -> str | None:
    """Describe tokens whose ids have no row in the embedding; None if there are none, or only transformers can tell."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    outside = sorted((number, token) for token, number in ids.items() if number >= rows)
    if not outside:
        return None
    number, token = outside[0]
    return (
        f"{len(outside)} tokens of the tokenizer have no row in the embedding of {rows} rows, first {token!r} of id "
        f"{number}; rows of data that hold one are refused"
    )


def _weights(name: str, folder: Path) -> Iterator[Path]:
    """Yield the files of the weights that are safetensors."""
    whole = folder / "model.safetensors"
    if whole.is_file():  # transformers prefers it to a table of shards
        yield whole
        return
    for index in INDEXES:
        if (folder / index).is_file():
            files = set(json.loads((folder / index).read_text()).get("weight_map", {}).values())
            missing = sorted(file for file in files if not (folder / file).is_file())
            if missing:
                raise CheckpointError(
                    f"source: {name} lacks {len(missing)} of {len(files)} files that {index} names, first "
                    f"{missing[0]}; download it again"
                )
            yield from (folder / file for file in sorted(files) if file.endswith(".safetensors"))
            return
    found = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    adapters = [path for path in found if path.name.startswith("adapter_model.")]
    if adapters and len(adapters) == len(found):
        raise CheckpointError(
            f"source: {name} holds adapters ({adapters[0].name}) and no model; merge them into their base first "
            "(peft: model.merge_and_unload), and import the result"
        )
    if not found:
        gguf = next(folder.glob("*.gguf"), None)
        holds = f"; {gguf.name} is GGUF, which transformers loads and saves as safetensors" if gguf else ""
        raise CheckpointError(f"source: {name} has no weights (*.safetensors or *.bin){holds}")
    yield from (path for path in found if path.suffix == ".safetensors" and path not in adapters)


def _check_safetensors(name: str, path: Path) -> None:
    """Check a file's table of contents against its size, and the types of its tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length) if 0 < length <= size else b""
    try:
        tensors = {key: value for key, value in json.loads(content).items() if key != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        with path.open("rb") as file:
            pointer = " (it is a pointer of Git LFS: git lfs pull)" if file.read(20) == b"version https://git-" else ""
        raise CheckpointError(f"source: {path} is no safetensors file{pointer}; download it again") from None
    if end != size:
        raise CheckpointError(
            f"source: {path} has {size:,} bytes, and its table of contents says {end:,}; it was cut off, download it "
            "again"
        )
    others = sorted({tensor["dtype"] for tensor in tensors.values()} - FLOATS)
    if others:
        raise CheckpointError(
            f"source: {name} has weights of type {', '.join(others)} in {path.name}, which cannot be trained; take the "
            "model in bfloat16"
        )
