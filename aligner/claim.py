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

from aligner.console import say
from aligner.errors import CheckpointError


@contextlib.contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Hold the folder of a run; rank 0 does. The system lets go of it when the process ends, however it ends.

    Raises:
        CheckpointError: another job holds it.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    lock, note = filelock.FileLock(run / ".lock", timeout=0), run / ".lock.json"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(
            f"log.name: another job is at work in {run}{_who(note)}; wait for it, end it, or choose another log.name"
        ) from None
    except (OSError, NotImplementedError) as error:
        say(f"{run} cannot be locked on this file system ({error}); see that no other job runs in it")
        yield
        return
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        note.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}))
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
