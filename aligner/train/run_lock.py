"""Lock of a run's folder: one job at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from aligner.common.console import is_first_rank, log_rank0
from aligner.common.errors import CheckpointError

LOCK = (".lock", ".lock.json")
"""Lock file of a run's folder, and the file that describes its owner."""


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Lock the folder of a run on rank 0. The system releases the lock when the process ends, however it ends.

    Raises:
        CheckpointError: another job has the lock.
    """
    if not is_first_rank():
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    # No marker file on a file system without locks: it would outlive a killed job on another machine.
    lock, note = filelock.FileLock(run / LOCK[0], timeout=0, fallback_to_soft=False), run / LOCK[1]
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(
            f"log.name: another job is at work in {run}{_owner(note)}; wait for it, end it, or choose another log.name"
        ) from None
    except (OSError, NotImplementedError) as error:
        log_rank0(f"{run} cannot be locked on this file system ({error}); see that no other job runs in it")
        yield
        return
    try:
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk is reported by the code that needs it
            note.write_text(json.dumps(owner))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _owner(note: Path) -> str:
    try:
        owner = json.loads(note.read_text())
        return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError):
        return ""
