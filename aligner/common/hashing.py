"""What rows, tokens and files are known by: hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from aligner.common.files import atomic_write


def short_hash(content: bytes) -> int:
    """64 bits, as a signed number that Arrow and numpy hold."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def files_hash(*paths: str | Path) -> str:
    """Of the bytes of some files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).expanduser().read_bytes()).digest())
    return digest.hexdigest()[:16]


def tokenizer_hash(hf: Any) -> str:
    """Of everything that decides which tokens a text becomes."""
    hf("")  # leaves no padding or truncation of an earlier call behind
    inside = hf.backend_tokenizer.to_str() if hf.is_fast else [sorted(hf.get_vocab().items()), repr(hf.init_kwargs)]
    parts = [type(hf).__name__, inside, hf.chat_template, hf.bos_token, hf.eos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_hash(path: Path, folder: Path) -> str:
    """Of a file's bytes; remembered in `folder` for as long as its size and times stay as they are."""
    state = _state(path)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    known = folder / "files" / f"{name}.json"
    try:
        remembered = json.loads(known.read_text())
        if remembered["state"] == state:
            return remembered["content"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    # A file written within the clock's last tick may change again without showing it.
    if time.time_ns() - max(state[:2]) > 2e9 and _state(path) == state:
        memory = json.dumps({"path": str(path.resolve()), "state": state, "content": digest.hexdigest()})
        # A folder that cannot be written to may hold the tokens all the same.
        with contextlib.suppress(OSError), atomic_write(known) as partial:
            partial.write_text(memory)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino]
