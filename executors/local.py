"""This machine."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
import psutil

from aligner.common import secret_names
from aligner.common.console import log

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 60.0
"""Seconds that processes are left for the step under way and a save. torchrun leaves its ranks 30."""


def local(*, ntasks_per_node: int = 1, env_vars: Optional[dict[str, str]] = None) -> run.LocalExecutor:
    """Processes of this machine; several are started by torchrun.

    Args:
        ntasks_per_node: processes; as many as the recipe's `trainer.devices`.
        env_vars: further environment of the job.
    """
    secret_names.refuse(env_vars)
    # NeMo-Run starts `torchrun` from PATH, which need not be the one beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return run.LocalExecutor(
        ntasks_per_node=ntasks_per_node,
        launcher="torchrun" if ntasks_per_node > 1 else None,
        env_vars={"PATH": path, "TORCHX_MAX_RETRIES": "0", **(env_vars or {})},
    )


@contextlib.contextmanager
def terminate_children_on_signal() -> Iterator[None]:
    """Within it, Ctrl-C or SIGTERM end the processes that were started, too; NeMo-Run would leave them behind.

    They are told once, so that they save, and killed if they are still there after `GRACE` seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    us = psutil.Process()
    there = {process.pid for process in us.children()}

    def end(number: int, _: Any) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        log("ends its jobs, which save first")
        started = [process for process in us.children() if process.pid not in there]
        family = [*started, *(p for process in started for p in process.children(recursive=True))]
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=GRACE)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
