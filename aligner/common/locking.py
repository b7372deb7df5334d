"""Locks of files and folders, between processes of one machine or of several that share a file system.

The system's own lock (`flock`) where the file system has it: it ends with its process. Elsewhere (Lustre mounted
without flock, NFS without lockd) a lease: a file that its owner touches, and that others take over once it is not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import filelock

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Errors of a file system without locks."""
LEASE_S = 60.0
"""Seconds without a touch after which a lease of another machine is taken over."""


class Busy(Exception):
    """Another process has the lock; the text describes it, as ` (process 7 on node3, since ...)`, or is empty."""


class Lock:
    """Lock of `path`, a file that exists for nothing else; a file beside it describes the owner.

    Args:
        on_loss: called from another thread if a lease is lost: this process was suspended, or the file system away,
            for so long that others may have taken the lock.
    """

    def __init__(self, path: Path, on_loss: Callable[[], None] | None = None) -> None:
        self.path, self.note, self._on_loss = path, path.with_name(f"{path.name}.json"), on_loss
        self._held: filelock.BaseFileLock | None = None

    def acquire(self, *, waiting: Callable[[str], None] | None) -> None:
        """Take the lock.

        Args:
            waiting: called with the owner's description if the lock is taken, before waiting for it; None: do not wait.

        Raises:
            Busy: the lock is taken, and `waiting` is None.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock: filelock.BaseFileLock = filelock.FileLock(self.path, fallback_to_soft=False, is_singleton=False)
        try:
            self._take(lock, waiting)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_FLOCK:
                raise
            lease = self.path.with_name(f"{self.path.name}.lease")
            lock = filelock.SoftFileLease(
                lease, lease_duration=LEASE_S, thread_local=False, on_compromise=lambda _: self._lost()
            )
            # That its owner is gone shows by watching it for so long.
            self._take(lock, waiting, at_least=LEASE_S * 1.1 + 1)
        self._held = lock
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk is reported by the code that needs it
            self.note.write_text(json.dumps(owner))

    def _take(self, lock: filelock.BaseFileLock, waiting: Callable[[str], None] | None, at_least: float = 0.0) -> None:
        try:
            lock.acquire(timeout=1 if waiting else at_least)
        except filelock.Timeout:
            if waiting is None:
                raise Busy(self._owner()) from None
            waiting(self._owner())
            lock.acquire()

    def _lost(self) -> None:
        if self._on_loss is not None:
            self._on_loss()

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        if self._held is not None:
            with contextlib.suppress(OSError):
                self.note.unlink(missing_ok=True)
            self._held.release(force=True)
            self._held = None

    def __enter__(self) -> None:
        self.acquire(waiting=lambda _: None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _owner(self) -> str:
        try:
            owner = json.loads(self.note.read_text())
            return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
