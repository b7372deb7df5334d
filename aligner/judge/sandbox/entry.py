"""The program of a sandbox: gives up rights, sets limits, and becomes one of the two sides."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

NOBODY = 65534
STARTED = b"started\n"


def main() -> None:
    """Read the text to run and its limits from standard input; the arguments are a side and its file descriptors."""
    side, (reading, writing, status) = sys.argv[1], map(int, sys.argv[2:])
    task = json.load(sys.stdin)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    # A worker process ignores signals of launchers, and what it starts inherits that.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (reading, writing, status):
        os.set_inheritable(number, False)
    if side == "answer":
        from aligner.judge.sandbox import answer_side

        _confine(task)
        os.write(status, STARTED)
        # The answer must not have it.
        os.close(status)
        answer_side.run(task["text"], reading, writing)
    else:
        from aligner.judge.sandbox import test_side

        _confine(task)
        os.write(status, STARTED)
        test_side.run(task["text"], reading, writing, status)


def _confine(task: dict[str, Any]) -> None:
    """Become nobody where this is root of a sandbox, and set the limits."""
    sys.path.pop(0)
    if task["processes"] is not None:
        if os.getuid() == 0:
            # The machine's root is exempt from the limit of processes.
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (task["processes"],) * 2)
    for kind, limit in (
        (resource.RLIMIT_CPU, task["seconds"] + 1),
        (resource.RLIMIT_AS, task["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))
    # Where nobody is left to end this process.
    signal.alarm(task["seconds"] + 5)
