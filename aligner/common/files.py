"""Atomic writes of files and folders."""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of the names of incomplete files and folders, in writing or in deletion."""


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block succeeds.

    A killed process leaves no file under the final name, and what it leaves beside goes with the next write to the
    same target. A failed block leaves no file at all.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial_of_killed(target)
    partial = target.with_name(f"{target.name}.{_processes()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        _remove(partial)


def remove_partial_of_killed(target: Path) -> None:
    """Remove what killed processes of this machine left of a target that they were writing."""
    pattern = re.compile(rf"{re.escape(target.name)}\.{_processes()}-(\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove(path)


@functools.cache
def _processes() -> str:
    """Return an identifier of the processes that this one can see: a machine since its start, or a container."""
    with contextlib.suppress(OSError):
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
        return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:8]
    return uuid.uuid4().hex[:8]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync_dir(folder: Path) -> None:
    """Flush a folder's directory entries to disk, to survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
