"""Checks before submission: job names, recipes that cannot be serialized, unreachable clusters."""

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
from aligner.executors.values import check_folder, unquoted


def check_not_in_job() -> None:
    """Check that this process is not a job that imports its launch script; the script would launch the job again.

    Raises:
        ConfigError: the process is such a job.
    """
    if "__external_main__" in sys.modules:
        raise ConfigError('launch: is called when the script is imported; put it below `if __name__ == "__main__":`')


def check_recipes(name: str, stages: Mapping[str, run.Partial], executor: run.Executor) -> None:
    """Check that names work as file names and in commands, recipes are serializable, and ranks match the executor.

    Raises:
        ConfigError: a name or a recipe is invalid.
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
        _check_serializable(stage, recipe)
        _check_ranks(stage, recipe, executor)
        _check_absolute_paths(stage, recipe, executor)


def check_stage_exists(text: str, name: str, stages: list[str]) -> None:
    """Check that a `stage:NAME` refers to an earlier stage.

    Raises:
        ConfigError: no earlier stage has this name.
    """
    if name not in stages:
        near = difflib.get_close_matches(name, stages, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{text!r}: there is no such stage before this one{hint}; there are: {', '.join(stages) or 'none'}"
        )


def check_executor(executor: run.Executor, *, detach: bool) -> None:
    """Check that the executor can run stages: Slurm or Docker responds, and its settings are valid.

    Raises:
        ConfigError: a check fails; nothing was submitted.
    """
    check_folder("NEMORUN_HOME", get_nemorun_home())
    if isinstance(executor, run.SlurmExecutor):
        _check_slurm(executor)
    elif detach:
        raise ConfigError(f"detach: {type(executor).__name__} keeps no jobs without this process; use Slurm")
    if isinstance(executor, run.DockerExecutor):
        _check_docker(executor)


# ---- recipes ------------------------------------------------------------------------------------------------------


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string of a recipe, in place; return the recipe."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, fdl.Buildable):
        for name, argument in list(value.__arguments__.items()):
            setattr(value, str(name), map_strings(argument, change))
    elif isinstance(value, dict):
        return {key: map_strings(argument, change) for key, argument in value.items()}
    elif isinstance(value, list | tuple):
        return type(value)(map_strings(argument, change) for argument in value)
    return value


def _check_serializable(stage: str, recipe: run.Partial) -> None:
    """Check that a recipe can be serialized, since a job receives it as text."""
    serializer = ZlibJSONSerializer()
    with contextlib.suppress(Exception):
        if serializer.deserialize(serializer.serialize(recipe)) == recipe:
            return
    for path, value in _leaves(recipe, ""):
        try:
            round_trips = (
                serializer.deserialize(serializer.serialize(run.Config(_identity, value=value))).value == value
            )
        except Exception:
            round_trips = False
        if not round_trips:
            raise ConfigError(
                f"stage {stage!r}: {path.lstrip('.')}: {value!r} cannot be shipped to a job; give what it is made of, "
                "as run.Config or run.Partial of something in a module, or a string in place of a path"
            )
    raise ConfigError(f"stage {stage!r}: the recipe cannot be shipped to a job")


def _identity(value: Any) -> Any:
    return value


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, fdl.Buildable):
        return [leaf for name, child in value.__arguments__.items() for leaf in _leaves(child, f"{path}.{name}")]
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in _leaves(child, f"{path}[{key!r}]")]
    if isinstance(value, list | tuple):
        return [leaf for i, child in enumerate(value) for leaf in _leaves(child, f"{path}[{i}]")]
    return [(path, value)]


def _check_ranks(stage: str, recipe: run.Partial, executor: run.Executor) -> None:
    """Check that trainers and engines use as many nodes and devices as the executor starts."""
    started = executor.nnodes(), executor.nproc_per_node()
    for path, configured in sizes(recipe):
        if configured != started:
            raise ConfigError(
                f"stage {stage!r}: {path}num_nodes={configured[0]} and {path}devices={configured[1]}, but the executor "
                f"starts {started[0]} x {started[1]} processes; make them the same"
            )


def sizes(recipe: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the path, nodes and devices of each trainer and engine of a recipe; those of other devices are left out."""
    for path, part in configs(recipe, ""):
        nodes, devices = (str(getattr(part, name, None) or 1) for name in ("num_nodes", "devices"))
        if getattr(part, "devices", None) is not None and nodes.isdigit() and devices.isdigit():
            yield path, (int(nodes), int(devices))


def configs(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every config of a recipe with its path."""
    if isinstance(value, fdl.Buildable):
        yield path, value
        for name, child in value.__arguments__.items():
            yield from configs(child, f"{path}{name}.")
    elif isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from configs(child, f"{path.removesuffix('.')}[{key!r}].")


def _check_absolute_paths(stage: str, recipe: run.Partial, executor: run.Executor) -> None:
    log: Any = getattr(recipe, "log", None)
    elsewhere = isinstance(executor, run.SlurmExecutor) and (
        executor.container_image is not None or not isinstance(executor.tunnel, run.LocalTunnel)
    )
    folders = {"log.log_dir": log.log_dir} if log is not None else {"output": getattr(recipe, "output", None)}
    for name, folder in folders.items():
        if elsewhere and folder is not None and not os.path.isabs(str(folder)):
            raise ConfigError(
                f"stage {stage!r}: {name}: {folder!r} is relative, and a job in a container or on another machine "
                "begins in a folder of its own, where the next one would not look; give an absolute one"
            )


# ---- executors ----------------------------------------------------------------------------------------------------


def _check_slurm(executor: run.SlurmExecutor) -> None:
    if "/nemo_run" in get_nemorun_home():
        raise ConfigError(
            f"NEMORUN_HOME: {get_nemorun_home()!r}; NeMo-Run takes '/nemo_run' in it for the job's own folder; set "
            "it to another, as ~/.nemo_run"
        )
    if isinstance(executor.tunnel, run.LocalTunnel) and shutil.which("sbatch") is None:
        raise ConfigError("run.executor: this machine has no sbatch; run on a login node, or give ssh=user@host")
    partitions = _run_on_cluster(executor, "sinfo --all --noheader --format=%R")
    if partitions.return_code:
        output = " ".join((partitions.stderr or partitions.stdout).split())
        raise ConfigError(f"run.executor: Slurm does not answer: {output}")
    known = set(partitions.stdout.split())
    missing = set((executor.partition or "").split(",")) - known - {""}
    if missing:
        raise ConfigError(
            f"run.executor.partition: there is no {', '.join(sorted(missing))!r}; there are: {', '.join(sorted(known))}"
        )
    if (
        executor.container_image is not None
        and "--container-image" not in _run_on_cluster(executor, "srun --help 2>&1").stdout
    ):
        raise ConfigError(
            f"run.executor.container_image: {unquoted(executor.container_image)}, but this Slurm has no pyxis to run "
            "containers; leave it out, and activate what the job needs by setup_lines=['source venv/bin/activate']"
        )
    if isinstance(executor.tunnel, run.LocalTunnel):
        image = unquoted(executor.container_image or "")
        if image.startswith(("/", "./")) and not Path(image).exists():
            raise ConfigError(f"run.executor.container_image: there is no {image}")
        for mount in map(unquoted, executor.container_mounts):
            folder = mount.split(":")[0]
            if os.path.isabs(folder) and not Path(folder).exists():
                raise ConfigError(f"run.executor.container_mounts: {mount}: there is no {folder}")


def _run_on_cluster(executor: run.SlurmExecutor, command: str) -> Any:
    """Run a command on the cluster; return its result."""
    try:
        return executor.tunnel.run(command, warn=True, in_stream=False)
    except SystemExit:
        raise ConfigError(f"run.executor.ssh: {executor.tunnel.key} lets nobody in with this key") from None
    except Exception as error:
        raise ConfigError(f"run.executor.ssh: {executor.tunnel.key} cannot be reached ({error})") from None


def _check_docker(executor: run.DockerExecutor) -> None:
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
