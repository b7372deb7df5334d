"""What is refused before anything is submitted: names, recipes that cannot be shipped, clusters that do not answer."""

import contextlib
import difflib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.config import get_nemorun_home
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from aligner.common.errors import ConfigError


def not_in_a_job() -> None:
    """See that this is not a job that imports the script which launched it; it would launch it again, and so on.

    Raises:
        ConfigError: it is.
    """
    if "__external_main__" in sys.modules:
        raise ConfigError('launch: is called when the script is imported; put it below `if __name__ == "__main__":`')


def check_recipes(name: str, stages: Mapping[str, run.Partial], executor: run.Executor) -> None:
    """See that NeMo-Run can make files and commands of the names, and that the recipes can be shipped and have room.

    Raises:
        ConfigError: it would break on one.
    """
    if not stages:
        raise ConfigError("stages: there are none")
    for title in (name, *stages):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", title):
            raise ConfigError(
                f"{title!r} cannot name a job; use up to 100 letters, digits, '_', '.' and '-', and begin with one of "
                "the first two"
            )
        if title.startswith("nemo_run"):
            raise ConfigError(f"{title!r} cannot name a job; NeMo-Run would take it for a folder of its own")
    for stage, recipe in stages.items():
        _shippable(stage, recipe)
        _ranks(stage, recipe, executor)
        _absolute(stage, recipe, executor)


def known_stage(text: str, name: str, stages: list[str]) -> None:
    """See that a `stage:NAME` names one.

    Raises:
        ConfigError: it does not.
    """
    if name not in stages:
        near = difflib.get_close_matches(name, stages, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{text!r}: there is no such stage before this one{hint}; there are: {', '.join(stages) or 'none'}"
        )


def check_executor(executor: run.Executor, *, detach: bool) -> None:
    """See that there is something to ship stages to.

    Raises:
        ConfigError: something is not as it must be; nothing was submitted.
    """
    home = get_nemorun_home()
    if re.search(r"\s", home):
        raise ConfigError(
            f"NEMORUN_HOME: {home!r}; NeMo-Run writes it into commands without quotes; set it to one without spaces"
        )
    if isinstance(executor, run.SlurmExecutor):
        _slurm(executor)
    elif detach:
        raise ConfigError(f"detach: {type(executor).__name__} keeps no jobs without this process; use Slurm")
    if isinstance(executor, run.DockerExecutor):
        _docker(executor)


# ---- recipes ------------------------------------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A recipe with every string in it changed, in place."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, fdl.Buildable):
        for name, held in list(value.__arguments__.items()):
            setattr(value, str(name), mapped(held, change))
    elif isinstance(value, dict):
        return {key: mapped(held, change) for key, held in value.items()}
    elif isinstance(value, list | tuple):
        return type(value)(mapped(held, change) for held in value)
    return value


def _shippable(stage: str, recipe: run.Partial) -> None:
    """What a job gets is text; not everything can be written down."""
    serializer = ZlibJSONSerializer()
    with contextlib.suppress(Exception):
        if serializer.deserialize(serializer.serialize(recipe)) == recipe:
            return
    for path, value in _leaves(recipe, ""):
        try:
            alike = serializer.deserialize(serializer.serialize(run.Config(_held, value=value))).value == value
        except Exception:
            alike = False
        if not alike:
            raise ConfigError(
                f"stage {stage!r}: {path.lstrip('.')}: {value!r} cannot be shipped to a job; give what it is made of, "
                "as run.Config or run.Partial of something in a module, or a string in place of a path"
            )
    raise ConfigError(f"stage {stage!r}: the recipe cannot be shipped to a job")


def _held(value: Any) -> Any:
    return value


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, fdl.Buildable):
        return [leaf for name, held in value.__arguments__.items() for leaf in _leaves(held, f"{path}.{name}")]
    if isinstance(value, dict):
        return [leaf for key, held in value.items() for leaf in _leaves(held, f"{path}[{key!r}]")]
    if isinstance(value, list | tuple):
        return [leaf for i, held in enumerate(value) for leaf in _leaves(held, f"{path}[{i}]")]
    return [(path, value)]


def _ranks(stage: str, recipe: run.Partial, executor: run.Executor) -> None:
    """All parts that take ranks, trainers and engines, take those that are started."""
    given = executor.nnodes(), executor.nproc_per_node()
    for path, part in _parts(recipe, ""):
        nodes, devices = getattr(part, "num_nodes", None), getattr(part, "devices", None)
        wanted = nodes or 1, devices
        if isinstance(devices, int) and wanted != given:
            raise ConfigError(
                f"stage {stage!r}: {path}num_nodes={wanted[0]} and {path}devices={devices}, but the executor starts "
                f"{given[0]} x {given[1]} processes; make them the same"
            )


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All configurations in a recipe, with where they are."""
    if isinstance(value, fdl.Buildable):
        yield path, value
        for name, held in value.__arguments__.items():
            yield from _parts(held, f"{path}{name}.")
    elif isinstance(value, dict | list | tuple):
        for key, held in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _parts(held, f"{path.removesuffix('.')}[{key!r}].")


def _absolute(stage: str, recipe: run.Partial, executor: run.Executor) -> None:
    log: Any = getattr(recipe, "log", None)
    elsewhere = isinstance(executor, run.SlurmExecutor) and (
        executor.container_image is not None or not isinstance(executor.tunnel, run.LocalTunnel)
    )
    named = {"log.log_dir": log.log_dir} if log is not None else {"output": getattr(recipe, "output", None)}
    for name, folder in named.items():
        if elsewhere and folder is not None and not os.path.isabs(str(folder)):
            raise ConfigError(
                f"stage {stage!r}: {name}: {folder!r} is relative, and a job in a container or on another machine "
                "begins in a folder of its own, where the next one would not look; give an absolute one"
            )


# ---- places -------------------------------------------------------------------------------------------------------


def _slurm(executor: run.SlurmExecutor) -> None:
    if "/nemo_run" in get_nemorun_home():
        raise ConfigError(
            f"NEMORUN_HOME: {get_nemorun_home()!r}; NeMo-Run takes '/nemo_run' in it for the job's own folder; set "
            "it to another, as ~/.nemo_run"
        )
    if isinstance(executor.tunnel, run.LocalTunnel) and shutil.which("sbatch") is None:
        raise ConfigError("run.executor: this machine has no sbatch; run on a login node, or give ssh=user@host")
    partitions = _asked(executor, "sinfo --all --noheader --format=%R")
    if partitions.return_code:
        said = " ".join((partitions.stderr or partitions.stdout).split())
        raise ConfigError(f"run.executor: Slurm does not answer: {said}")
    known = set(partitions.stdout.split())
    missing = set((executor.partition or "").split(",")) - known - {""}
    if missing:
        raise ConfigError(
            f"run.executor.partition: there is no {', '.join(sorted(missing))!r}; there are: {', '.join(sorted(known))}"
        )
    if executor.container_image is not None and "--container-image" not in _asked(executor, "srun --help 2>&1").stdout:
        raise ConfigError(
            f"run.executor.container_image: {executor.container_image}, but this Slurm has no pyxis to run containers; "
            "leave it out, and activate what the job needs by setup_lines=['source venv/bin/activate']"
        )
    if isinstance(executor.tunnel, run.LocalTunnel):
        image = executor.container_image or ""
        if image.startswith(("/", "./")) and not Path(image).exists():
            raise ConfigError(f"run.executor.container_image: there is no {image}")
        for mount in executor.container_mounts:
            folder = mount.split(":")[0]
            if os.path.isabs(folder) and not Path(folder).exists():
                raise ConfigError(f"run.executor.container_mounts: {mount}: there is no {folder}")


def _asked(executor: run.SlurmExecutor, command: str) -> Any:
    """What a command says on the cluster."""
    try:
        return executor.tunnel.run(command, warn=True, in_stream=False)
    except SystemExit:
        raise ConfigError(f"run.executor.ssh: {executor.tunnel.key} lets nobody in with this key") from None
    except Exception as error:
        raise ConfigError(f"run.executor.ssh: {executor.tunnel.key} cannot be reached ({error})") from None


def _docker(executor: run.DockerExecutor) -> None:
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise ConfigError(
            f"run.executor: Docker does not answer ({error}); start it, or set DOCKER_HOST to where it listens"
        ) from None
    image = executor.container_image
    try:
        client.images.get(image)
    except DockerException:
        try:
            client.images.get_registry_data(image)
        except DockerException as error:
            raise ConfigError(
                f"run.executor.container_image: {image!r} is neither here (`docker images`) nor in a registry ({error})"
            ) from None
