"""Hashes of rows, tokens and files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import xxhash

from aligner.common.files import atomic_write

DAMAGE = "hash"
"""Key of a sealed object with the hash of its other values."""


def damage_hash(path: Path) -> str:
    """Hash a file's bytes, to find damage; not against somebody who wants a given hash. Gigabytes per second."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the hash of its content, for `unsealed`."""
    return {**content, DAMAGE: xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())}


def unsealed(text: str) -> dict[str, Any]:
    """Return the content of a sealed object.

    Raises:
        ValueError: it is not JSON, not sealed, or not what was sealed.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or DAMAGE not in content:
        raise ValueError("has no hash of itself")
    seal = content.pop(DAMAGE)
    if sealed(content)[DAMAGE] != seal:
        raise ValueError("is not what was written")
    return content


def short_hash(content: bytes) -> int:
    """Hash bytes to a signed 64-bit integer, as Arrow and numpy store it."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def files_hash(*paths: str | Path) -> str:
    """Hash the bytes of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).expanduser().read_bytes()).digest())
    return digest.hexdigest()[:16]


def tokenizer_hash(hf: Any) -> str:
    """Hash everything that determines a text's tokens."""
    hf("")  # resets padding and truncation of an earlier call
    backend = hf.backend_tokenizer.to_str() if hf.is_fast else [sorted(hf.get_vocab().items()), repr(hf.init_kwargs)]
    parts = [type(hf).__name__, backend, hf.chat_template, hf.bos_token, hf.eos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_hash(path: Path, folder: Path) -> str:
    """Hash a file's bytes; `folder` caches the hash until the file's size, times or inode change."""
    state = _stat_fields(path)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    cache = folder / "files" / f"{name}.json"
    try:
        cached = json.loads(cache.read_text())
        if cached["state"] == state:
            return cached["content"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    # A file written within the last clock tick may change again under the same time stamps.
    if time.time_ns() - max(state[:2]) > 2e9 and _stat_fields(path) == state:
        entry = json.dumps({"path": str(path.resolve()), "state": state, "content": digest.hexdigest()})
        # A read-only folder may still contain cached tokens.
        with contextlib.suppress(OSError), atomic_write(cache) as partial:
            partial.write_text(entry)
    return digest.hexdigest()


def _stat_fields(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino]
