"""Lock of a run's folder: one job at a time."""

from __future__ import annotations

import contextlib
import os
import sys
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

    On a file system without locks, a process that was suspended until another job took the folder ends within two
    thirds of a lease (40 s) of waking: what it writes later would belong to the other job.

    Raises:
        CheckpointError: another job has the lock.
    """
    if not is_first_rank():
        yield
        return
    lock = Lock(run / LOCK, on_loss=lambda: _end(run))
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


def _end(run: Path) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(
            f"log.name: this job was suspended, or {run} was out of reach, for so long that another job may be at work "
            "in it; this one ends without another checkpoint. The same command goes on from the newest one\n"
        )
        sys.stderr.flush()
    os._exit(1)
