"""Executor: a Docker container on this machine."""

import os
from pathlib import Path
from typing import Optional

import nemo_run as run

from aligner.common.errors import ConfigError
from aligner.executors import values


def docker(
    *,
    container_image: str,
    ntasks_per_node: int = 1,
    gpus: Optional[int] = None,
    volumes: Optional[list[str]] = None,
    shm_size: str = "8g",
    ulimits: Optional[list[str]] = None,
    network: str = "host",
    env_vars: Optional[dict[str, str]] = None,
) -> run.DockerExecutor:
    """Run in a Docker container; torchrun starts several processes. The working directory is the current folder.

    Args:
        container_image: image name, or `sha256:...`, which is not looked up in a registry.
        ntasks_per_node: number of processes; equal to the recipe's `trainer.devices`.
        gpus: number of visible GPUs; -1: all; None: none.
        volumes: volumes to mount, `/data:/data`, `/data:/data:ro`.
        shm_size: size of shared memory, which NCCL and data workers use.
        ulimits: `name:soft[:hard]`; None: the values of NVIDIA's guide, unlimited locked memory and a 64 MiB stack.
        network: "host", or the name of a Docker network.
        env_vars: environment variables of the job.

    Raises:
        ConfigError: a volume's folder does not exist or cannot be mounted, or a value looks like a secret.
    """
    values.check_env_vars(env_vars)
    for field, value in (("container_image", container_image), ("network", network), ("shm_size", shm_size)):
        values.check_one_line(field, value)
        values.refuse_secret(field, value)
    for volume in volumes or []:
        values.check_one_line("volumes", volume)
        folder = Path(volume.split(":")[0]).expanduser()
        if folder.is_absolute() and not folder.exists():
            raise ConfigError(f"run.executor.volumes: {volume}: there is no {folder}; Docker would make an empty one")
    # The working directory of NeMo-Run's containers is /nemo_run/code.
    if ":" in os.getcwd():
        raise ConfigError(f"run.executor: Docker cannot mount {os.getcwd()!r}, which has a colon; start elsewhere")
    mounts = [f"{os.getcwd()}:/nemo_run/code", *(volumes or [])]
    # The container's host name does not resolve in the host network; torchrun would wait for it.
    local_address = {"PET_LOCAL_ADDR": "127.0.0.1"} if network == "host" else {}
    return run.DockerExecutor(
        container_image=container_image,
        ntasks_per_node=ntasks_per_node,
        num_gpus=gpus,
        volumes=mounts,
        shm_size=shm_size,
        ulimits=["memlock:-1", "stack:67108864"] if ulimits is None else ulimits,
        ipc_mode="host",
        network=network,
        packager=run.Packager(),
        launcher="torchrun" if ntasks_per_node > 1 else None,
        env_vars={**local_address, **(env_vars or {})},
    )
