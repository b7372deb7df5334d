"""An answer to `sacct` where Slurm keeps no accounts: NeMo-Run asks it for the state of every job."""

import os
from pathlib import Path

import nemo_run as run

STAND_IN = Path(__file__).resolve().parent / "bin"
"""A folder with a `sacct` that answers from `scontrol`."""


def have_answered(executor: run.SlurmExecutor) -> None:
    """See that `sacct` answers in this process: put the stand-in first on the PATH where the real one does not.

    Of a job that ended, the stand-in knows for as long as the controller does (`MinJobAge`, five minutes by default).
    """
    if not isinstance(executor.tunnel, run.LocalTunnel):
        return
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != str(STAND_IN)]
    real = executor.tunnel.run(f"PATH='{os.pathsep.join(path)}' sacct --jobs=0", warn=True, in_stream=False)
    if real.return_code:
        path = [str(STAND_IN), *path]
    # Left so: jobs of other threads may be asked for, too.
    os.environ["PATH"] = os.pathsep.join(path)
