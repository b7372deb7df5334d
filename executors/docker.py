"""A container on this machine."""

import os
from pathlib import Path
from typing import Optional

import nemo_run as run

from aligner.common import secret_names
from aligner.common.errors import ConfigError


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
    """Processes in a container, several by torchrun; they begin in the folder where this is called.

    Args:
        container_image: a name, or `sha256:...`, which is not looked up in a registry.
        ntasks_per_node: processes; as many as the recipe's `trainer.devices`.
        gpus: how many it sees; -1: all; None: none.
        volumes: `/data:/data`, `/data:/data:ro`.
        shm_size: shared memory, which NCCL and data workers use.
        ulimits: `name:soft[:hard]`; None: those of NVIDIA's guide, unlimited locked memory and a stack of 64 MiB.
        network: "host", or the name of a network.
        env_vars: environment of the job.

    Raises:
        ConfigError: a volume's folder is not there, or a variable looks like a secret.
    """
    secret_names.refuse(env_vars)
    for volume in volumes or []:
        folder = Path(volume.split(":")[0]).expanduser()
        if folder.is_absolute() and not folder.exists():
            raise ConfigError(f"run.executor.volumes: {volume}: there is no {folder}; Docker would make an empty one")
    # NeMo-Run's containers begin in /nemo_run/code.
    mounts = [f"{os.getcwd()}:/nemo_run/code", *(volumes or [])]
    # A container's own name leads nowhere in the host's network, and torchrun would wait there.
    address = {"PET_LOCAL_ADDR": "127.0.0.1"} if network == "host" else {}
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
        env_vars={**address, **(env_vars or {})},
    )
