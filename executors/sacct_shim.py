"""An answer to `sacct` where Slurm keeps no accounts: NeMo-Run asks it for the state of every job."""

import os
from pathlib import Path

import nemo_run as run

from aligner.common.errors import ConfigError

SHIM = Path(__file__).resolve().parent / "sacct-shim"
"""A folder with a `sacct` that answers from `scontrol`."""


def ensure_sacct(executor: run.SlurmExecutor, *, detach: bool) -> None:
    """See that `sacct` answers in this process: put the stand-in first on the PATH where the real one does not.

    Of a job that ended, the stand-in knows for as long as the controller does (`MinJobAge`, five minutes by default).

    Raises:
        ConfigError: jobs of another machine are to be followed, and it keeps no accounts.
    """
    if not isinstance(executor.tunnel, run.LocalTunnel):
        if not detach and executor.tunnel.run("sacct --jobs=0", warn=True, in_stream=False).return_code:
            # NeMo-Run would cancel a job whose state it cannot ask for.
            raise ConfigError(
                f"run.executor.ssh: Slurm keeps no accounts at {executor.tunnel.key}, so that jobs cannot be followed "
                "from here; submit with --detach (detach=True), or run on its login node"
            )
        return
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != str(SHIM)]
    real = executor.tunnel.run(f"PATH='{os.pathsep.join(path)}' sacct --jobs=0", warn=True, in_stream=False)
    if real.return_code:
        path = [str(SHIM), *path]
    # Left so: jobs of other threads may be asked for, too.
    os.environ["PATH"] = os.pathsep.join(path)
