"""What a person gives, on its way into batch scripts, commands and job folders: quoted once, or refused.

NeMo-Run quotes the values of `#SBATCH` lines. It writes arguments of srun, exported values and the folders of jobs as
they are; the first two are quoted here, and folders are refused if they would need it.
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any, Optional

from aligner.common.errors import ConfigError
from aligner.common.secrets_filter import hidden, is_secret

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
PLAIN_FOLDER = re.compile(r"[\w./@+=][\w./@+=-]*")
OWN_FOLDER = "/$nemo_run"
"""What NeMo-Run replaces by the folder of the job, at the beginning of a mount."""


def quoted(text: str) -> str:
    """Return a text as one word of a shell."""
    # Without a container, NeMo-Run replaces /nemo_run everywhere in the script; '' is nothing, also between quotes.
    return shlex.quote(text).replace("/nemo_run", "/''nemo_run")


def unquoted(word: str) -> str:
    """Return what `quoted` was given."""
    return "".join(shlex.split(word))


def check_one_line(field: str, value: Any) -> None:
    """Check that a value has no line break and no other control character, which would end a line of the script.

    Raises:
        ConfigError: it has one.
    """
    found = CONTROL.search(str(value))
    if found is not None:
        raise ConfigError(
            f"run.executor.{field}: {str(value)[:80]!r} has the character {found[0]!r} in it; give one line of text"
        )


def flag(value: Any) -> Any:
    """Return a value for NeMo-Run's `#SBATCH --flag='VALUE'`: Slurm reads a backslash also between single quotes."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def check_folder(field: str, value: str) -> None:
    """Check that a folder of NeMo-Run's jobs needs no quotes, because NeMo-Run writes it into commands without any.

    Raises:
        ConfigError: it needs some.
    """
    if not PLAIN_FOLDER.fullmatch(value):
        raise ConfigError(
            f"{field}: {value!r}; NeMo-Run writes it into commands without quotes; name a folder without spaces, of "
            "letters, digits and _ . / @ + = - alone"
        )


def quoted_mount(field: str, mount: str) -> str:
    """Return a mount, `/data:/data`, as a part of srun's list of mounts.

    Raises:
        ConfigError: it has a comma, with which the list separates mounts, or a line break.
    """
    check_one_line(field, mount)
    if "," in mount:
        raise ConfigError(
            f"run.executor.{field}: {mount!r} has a comma, at which Slurm would divide it; give each mount as an item "
            "of the list, and a folder without a comma"
        )
    if mount.startswith(OWN_FOLDER):
        return OWN_FOLDER + (quoted(mount.removeprefix(OWN_FOLDER)) if mount != OWN_FOLDER else "")
    return quoted(mount)


def refuse_secret(field: str, value: Any) -> None:
    """Refuse a value with a secret, as a URL with a password: it would be written into the job's files.

    Raises:
        ConfigError: it has one; the message does not.
    """
    shown = hidden(str(value))
    if shown != str(value):
        kinds = sorted(set(re.findall(r"\[hidden: ([^\]]*)\]", shown)))
        raise ConfigError(
            f"run.executor.{field}: has what looks like a secret ({', '.join(kinds)}), and would be written into the "
            "job's files; export it as a variable, and write its name"
        )


def check_env_vars(env_vars: Optional[Mapping[str, str]]) -> None:
    """Check names of environment variables, and refuse secrets: a job's environment is written into its files.

    Raises:
        ConfigError: a name is none, or a variable looks like a secret by its name or by its value.
    """
    for name, value in (env_vars or {}).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"run.executor.env_vars: {name!r} is no name of a variable")
        if "\0" in str(value):
            raise ConfigError(f"run.executor.env_vars: {name} has the character '\\x00' in it")
        if is_secret(name, str(value)) or hidden(str(value)) != str(value):
            raise ConfigError(
                f"run.executor.env_vars: {name} looks like a secret, and would be written into the job's files; export "
                "it instead, jobs on this machine and of Slurm are passed what is exported"
            )
