"""The files beside the weights of an exported model: the source's own, and what training changed of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aligner.checkpoint import source_files
from aligner.checkpoint.source_files import GENERATION
from aligner.common.hashing import tokenizer_hash
from aligner.data.tokenization import ResponseTokenizer


def complete(folder: Path, checkpoint: Path, tokenizer: Any) -> None:
    """Complete a folder that NeMo exported: `tokenizer` is the one that the checkpoint was trained with.

    Prints each field that differs from the model that training started from.
    """
    hf = getattr(tokenizer, "tokenizer", tokenizer)
    kept = source_files.kept_in(checkpoint)
    if kept is not None:
        for name in source_files.names(folder):
            (folder / name).unlink()
        same = _same_tokenizer(kept, hf)
        names = [name for name in source_files.names(kept) if name != source_files.ORIGIN]
        source_files.copy(kept, folder, only=[name for name in names if same or not _is_tokenizers(name)])
        if not same:
            print("tokenizer: another than that of the model that training started from, and written in its place")
            hf.save_pretrained(folder)
    _write_ends(folder, ResponseTokenizer(hf).stop_token_ids)


def open_to_readers(folder: Path) -> None:
    """Give files the permissions of new ones; safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _same_tokenizer(kept: Path, hf: Any) -> bool:
    from aligner.checkpoint.tokenizers import named_tokenizer
    from aligner.common.errors import ConfigError

    try:
        return tokenizer_hash(named_tokenizer(str(kept))) == tokenizer_hash(hf)
    except ConfigError:
        return False


def _is_tokenizers(name: str) -> bool:
    begins = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", source_files.TEMPLATES)
    return name.startswith(begins) or name.endswith((".model", ".tiktoken"))


def _write_ends(folder: Path, ends: set[int]) -> None:
    """Add the tokens that end an answer to those at which the model's generation stops."""
    path = folder / GENERATION
    values, known = source_files.read_json(path) if path.is_file() else {}, source_files.ends(folder)
    added = sorted(ends - set(known))
    if added:
        print(f"{GENERATION}: eos_token_id {[*known, *added]}; it was {known}, and answers end with {added}")
        path.write_text(json.dumps({**values, "eos_token_id": [*known, *added]}, indent=2) + "\n")
