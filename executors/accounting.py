"""An answer to `sacct` where Slurm keeps no accounts: NeMo-Run asks it for the state of every job."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import nemo_run as run

STAND_IN = Path(__file__).resolve().parent / "bin"
"""A folder with a `sacct` that answers from `scontrol`."""


@contextlib.contextmanager
def answered(executor: run.SlurmExecutor) -> Iterator[None]:
    """Within it, `sacct` answers, by the stand-in if need be.

    Of a job that ended it knows for as long as the controller does (`MinJobAge`, five minutes by default).
    """
    before = os.environ["PATH"]
    if isinstance(executor.tunnel, run.LocalTunnel) and executor.tunnel.run("sacct --jobs=0", warn=True).return_code:
        os.environ["PATH"] = f"{STAND_IN}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
