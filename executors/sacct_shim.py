"""A stand-in for `sacct` on clusters without Slurm accounting; NeMo-Run reads the state of every job from `sacct`."""

import os
from pathlib import Path

import nemo_run as run

from aligner.common.errors import ConfigError
from aligner.executors.values import quoted

SHIM = Path(__file__).resolve().parent / "sacct-shim"
"""Folder of a `sacct` script that reads from `scontrol`."""


def ensure_sacct(executor: run.SlurmExecutor, *, detach: bool) -> None:
    """Put the stand-in first on the PATH of this process if the real `sacct` fails.

    The stand-in lists a finished job only as long as the controller does (`MinJobAge`, five minutes by default).

    Raises:
        ConfigError: jobs on another machine are not detached, and that machine has no Slurm accounting.
    """
    if not isinstance(executor.tunnel, run.LocalTunnel):
        if not detach and executor.tunnel.run("sacct --jobs=0", warn=True, in_stream=False).return_code:
            # NeMo-Run would cancel a job without a known state.
            raise ConfigError(
                f"run.executor.ssh: Slurm keeps no accounts at {executor.tunnel.key}, so that jobs cannot be followed "
                "from here; submit with --detach (detach=True), or run on its login node"
            )
        return
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != str(SHIM)]
    real = executor.tunnel.run(f"PATH={quoted(os.pathsep.join(path))} sacct --jobs=0", warn=True, in_stream=False)
    if real.return_code:
        path = [str(SHIM), *path]
    # PATH is not restored: other threads may follow jobs, too.
    os.environ["PATH"] = os.pathsep.join(path)
