"""A site's executors by name, from one file: what a team writes down once.

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
    """Where profiles are read from: $NEMO_ALIGN_EXECUTORS, or `nemo-align/executors.toml` of the user's settings."""
    settings = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.environ.get("NEMO_ALIGN_EXECUTORS") or f"{settings}/nemo-align/executors.toml").expanduser()


def profiles() -> dict[str, run.Config]:
    """Every profile as a config of its factory.

    Raises:
        ConfigError: the file, or a profile in it, is not as it must be.
    """
    path = file()
    if not path.is_file():
        return {}
    try:
        found = tomli.loads(path.read_text())
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error})") from None
    return {name: _config(f"{path}: [{name}]", held) for name, held in found.items()}


def profile(name: str, **changed: Any) -> run.Executor:
    """The executor of a profile, with some of its settings changed.

    Raises:
        ConfigError: there is no such profile, or a setting is none.
    """
    found = profiles()
    if name not in found:
        raise ConfigError(f"{file()}: there is no [{name}]; there are: {', '.join(found) or 'none'}")
    config = found[name]
    return config.__fn_or_cls__(**{**config.__arguments__, **changed})


def _config(where: str, held: Any) -> run.Config:
    if not isinstance(held, dict) or held.get("executor") not in KINDS:
        raise ConfigError(f'{where}: expected executor = "slurm", "docker" or "local", and that one\'s settings')
    make, given = KINDS[held["executor"]], {k: v for k, v in held.items() if k != "executor"}
    known = inspect.signature(make).parameters
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: {held['executor']} has no setting {name!r}; it has: {', '.join(known)}")
    return run.Config(make, **given)
