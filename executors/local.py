"""Executor: processes on this machine."""

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

from aligner.common.console import log
from aligner.executors import values

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 60.0
"""Seconds for processes to finish the current step and save; torchrun gives its ranks 30 s."""


def local(*, ntasks_per_node: int = 1, env_vars: Optional[dict[str, str]] = None) -> run.LocalExecutor:
    """Run on this machine; torchrun starts several processes.

    Args:
        ntasks_per_node: number of processes; equal to the recipe's `trainer.devices`.
        env_vars: additional environment variables of the job.

    Raises:
        ConfigError: a variable looks like a secret.
    """
    values.check_env_vars(env_vars)
    # NeMo-Run starts the first `torchrun` in PATH; put this Python's folder first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return run.LocalExecutor(
        ntasks_per_node=ntasks_per_node,
        launcher="torchrun" if ntasks_per_node > 1 else None,
        env_vars={"PATH": path, "TORCHX_MAX_RETRIES": "0", **(env_vars or {})},
    )


@contextlib.contextmanager
def terminate_children_on_signal() -> Iterator[None]:
    """On Ctrl-C, SIGTERM or a closed terminal, also end the processes started within the context.

    NeMo-Run would leave them running. Each process receives SIGTERM once and saves. A process that runs after `GRACE`
    seconds is killed, and all at once by a second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    parent = psutil.Process()
    existing_pids = {process.pid for process in parent.children()}

    def end(number: int, _: Any) -> None:
        started = [process for process in parent.children() if process.pid not in existing_pids]
        processes = [*started, *(p for process in started for p in process.children(recursive=True))]

        def kill(number: int, _: Any) -> None:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            raise SystemExit(128 + number)

        for again in handled:
            signal.signal(again, kill)
        with contextlib.suppress(OSError):  # a terminal that has closed
            log("terminating the jobs, which save first; once more ends them at once")
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=GRACE)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise SystemExit(128 + number)

    # nohup and shells have processes in the background ignore these two.
    handled = [number for number in SIGNALS if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN]
    old_handlers = {number: signal.signal(number, end) for number in handled}
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
