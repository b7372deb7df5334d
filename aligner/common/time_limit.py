"""A limit on the time of Python code that somebody else wrote, as a template."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TookTooLong(Exception):
    """The code did not end in its time."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt a block after some time; in a thread, where Python has no way to, there is no limit.

    Raises:
        TookTooLong: the block did not end.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) is None:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)
