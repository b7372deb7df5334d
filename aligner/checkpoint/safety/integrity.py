"""Hashes of a checkpoint's files, to find damage: a file cut short, a byte that changed, a file that is gone.

`hashes.json` beside the weights has size and hash of every other file, and a hash of itself. It is written last, after
all files have reached the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aligner.common.console import log_rank0
from aligner.common.files import fsync_dir
from aligner.common.hashing import damage_hash, sealed, unsealed

HASHES = "hashes.json"
"""File of a checkpoint."""
THREADS = 8
"""Files that are read at once."""
CHEAP = 50e9
"""Bytes of a checkpoint that is compared with its hashes whenever it is loaded."""

Hashes = dict[str, tuple[int, str]]
"""Path in the checkpoint -> bytes, hash."""


def files_of(checkpoint: Path) -> list[str]:
    """List the files of a checkpoint that have a hash, relative to it."""
    found = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if str(path) != HASHES)


def compute(checkpoint: Path, names: Iterable[str]) -> Hashes:
    """Read files and return their hashes."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(lambda name: (name, _hash(checkpoint / name)), names))


def _hash(path: Path) -> tuple[int, str]:
    return path.stat().st_size, damage_hash(path)


def write(checkpoint: Path, hashes: Hashes | None = None) -> None:
    """Flush all files of a checkpoint to the disk and write their hashes.

    Args:
        hashes: those that other processes have computed; None: compute all.
    """
    names = files_of(checkpoint)
    hashes = hashes or {}
    hashes = hashes | compute(checkpoint, [name for name in names if name not in hashes])
    text = json.dumps(sealed({"files": {name: list(hashes[name]) for name in names}}), indent=1)
    with (checkpoint / HASHES).open("w") as file:
        file.write(text + "\n")
    flush(checkpoint)


def flush(checkpoint: Path) -> None:
    """Flush all files and folders of a checkpoint to the disk."""
    for name in (*files_of(checkpoint), HASHES):
        if (checkpoint / name).is_file():
            with (checkpoint / name).open("rb") as file:
                os.fsync(file.fileno())
    for folder in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        fsync_dir(folder)


def read(checkpoint: Path) -> Hashes | None:
    """Return the hashes of a checkpoint's files; None if it was written without.

    Raises:
        ValueError: the file of hashes is damaged.
    """
    path = checkpoint / HASHES
    if not path.is_file():
        return None
    return {name: (int(size), str(value)) for name, (size, value) in unsealed(path.read_text())["files"].items()}


def find_missing(checkpoint: Path) -> str | None:
    """Describe a file that is gone or of another size than was written; reads no content of files.

    None if there is none, or if the checkpoint was written without hashes.
    """
    try:
        hashes = read(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{HASHES} cannot be read ({error})"
    for name, (size, _) in (hashes or {}).items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and {size} were written"
    return None


def damage_where_cheap(checkpoint: Path, verify: bool | None = None) -> str | None:
    """Describe the first damaged file of a checkpoint; None if there is none, or if it is not looked for.

    Args:
        verify: whether to read all files; None: if they have at most `CHEAP` bytes.
    """
    hashes = _read_or_none(checkpoint)
    if hashes is None or verify is False:
        return None
    size = sum(size for size, _ in hashes.values())
    if verify is None and size > CHEAP:
        log_rank0(
            f"{checkpoint}: {size / 1e9:.0f} GB are not compared with their hashes; `nemo llm verify-checkpoint` and "
            "resume.verify=True do so"
        )
        return None
    state = (checkpoint, (checkpoint / HASHES).stat().st_mtime_ns)
    if state in _whole:
        return None
    damage = next(iter(find_damage(checkpoint)), None)
    if damage is None:
        _whole.add(state)
    return damage


_whole: set[tuple[Path, int]] = set()
"""Checkpoints that this process has compared, with the time of their hashes."""


def _read_or_none(checkpoint: Path) -> Hashes | None:
    try:
        return read(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # which `find_missing` tells


def find_damage(checkpoint: Path) -> list[str]:
    """Compare every file with its hash; return what is wrong, a line each.

    Empty for a checkpoint without hashes, which `read` tells.
    """
    missing = find_missing(checkpoint)
    if missing is not None:
        return [missing]
    hashes = read(checkpoint) or {}

    def problem(name: str) -> str | None:
        try:
            return None if _hash(checkpoint / name) == hashes[name] else f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error})"

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for found in pool.map(problem, hashes) if found is not None]
