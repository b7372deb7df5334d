"""Lock of a run's folder: one job at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from aligner.common.console import is_first_rank
from aligner.common.errors import CheckpointError
from aligner.common.locking import Busy, Lock

LOCK = ".lock"
"""Lock file of a run's folder."""


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Lock the folder of a run on rank 0, until the process ends, however it ends.

    Raises:
        CheckpointError: another job has the lock.
    """
    if not is_first_rank():
        yield
        return
    lock = Lock(run / LOCK)
    try:
        lock.acquire(waiting=None)
    except Busy as owner:
        raise CheckpointError(
            f"log.name: another job is at work in {run}{owner}; wait for it, end it, or choose another log.name"
        ) from None
    try:
        yield
    finally:
        lock.release()
