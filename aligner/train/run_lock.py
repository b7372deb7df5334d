"""One job at a time in a run's folder."""

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
"""Files of a run's folder that say that it is held, and by whom."""


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the folder of a run; rank 0 does. The system lets go of it when the process ends, however it ends.

    Raises:
        CheckpointError: another job holds it.
    """
    if not is_first_rank():
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    # Not a marker file instead, where there are no locks: that one would outlive a killed job on another machine.
    lock, note = filelock.FileLock(run / LOCK[0], timeout=0, fallback_to_soft=False), run / LOCK[1]
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(
            f"log.name: another job is at work in {run}{_who(note)}; wait for it, end it, or choose another log.name"
        ) from None
    except (OSError, NotImplementedError) as error:
        log_rank0(f"{run} cannot be locked on this file system ({error}); see that no other job runs in it")
        yield
        return
    try:
        said = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk is said by what needs it
            note.write_text(json.dumps(said))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _who(note: Path) -> str:
    try:
        found = json.loads(note.read_text())
        return f" (process {found['process']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, KeyError):
        return ""
