"""Executor profiles: named executor settings of a site, in one TOML file.

    # ~/.config/nemo-align/executors.toml
    [mycluster]
    executor = "slurm"
    account = "acct"
    partition = "gpu"
    gpus_per_node = 8

`run.executor=mycluster run.executor.nodes=4` on the command line, `executors.profile("mycluster", nodes=4)` in Python.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import tomli

from aligner.common.errors import ConfigError
from aligner.executors.docker import docker
from aligner.executors.local import local
from aligner.executors.slurm import slurm

KINDS: dict[str, Callable[..., run.Executor]] = {"local": local, "docker": docker, "slurm": slurm}


def file() -> Path:
    """Return the path of the profiles: $NEMO_ALIGN_EXECUTORS, or `nemo-align/executors.toml` in $XDG_CONFIG_HOME."""
    settings = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.environ.get("NEMO_ALIGN_EXECUTORS") or f"{settings}/nemo-align/executors.toml").expanduser()


def profiles() -> dict[str, run.Config]:
    """Return every profile as a config of its executor function.

    Raises:
        ConfigError: the file or one of its profiles is invalid.
    """
    path = file()
    if not path.is_file():
        return {}
    try:
        tables = tomli.loads(path.read_text())
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error})") from None
    return {name: _config(f"{path}: [{name}]", table) for name, table in tables.items()}


def profile(name: str, **changed: Any) -> run.Executor:
    """Return the executor of a profile, with settings overridden by `changed`.

    Raises:
        ConfigError: the profile does not exist, or one of its settings is unknown.
    """
    configs = profiles()
    if name not in configs:
        raise ConfigError(f"{file()}: there is no [{name}]; there are: {', '.join(configs) or 'none'}")
    config = configs[name]
    return config.__fn_or_cls__(**{**config.__arguments__, **changed})


def _config(where: str, table: Any) -> run.Config:
    if not isinstance(table, dict) or table.get("executor") not in KINDS:
        raise ConfigError(f'{where}: expected executor = "slurm", "docker" or "local", and that one\'s settings')
    make, settings = KINDS[table["executor"]], {k: v for k, v in table.items() if k != "executor"}
    known = inspect.signature(make).parameters
    for name in settings:
        if name not in known:
            raise ConfigError(f"{where}: {table['executor']} has no setting {name!r}; it has: {', '.join(known)}")
    return run.Config(make, **settings)
