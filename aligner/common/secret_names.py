"""Detection of environment variables whose names look like secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping

from aligner.common.errors import ConfigError

SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASS|KEY|CREDENTIAL|AUTH|JWT", re.IGNORECASE)


def refuse(env_vars: Mapping[str, str] | None) -> None:
    """Refuse secrets in a job's environment, which is written into the job's script and folder.

    Raises:
        ConfigError: the name of a variable looks like a secret.
    """
    for name in env_vars or {}:
        if SECRET.search(name):
            raise ConfigError(
                f"run.executor.env_vars: {name} looks like a secret, and would be written into the job's files; export "
                "it instead, jobs on this machine and of Slurm are passed what is exported"
            )
