"""Ranks that a command without an executor starts on this machine."""

from __future__ import annotations

import nemo_run as run

from aligner.common.errors import ConfigError
from aligner.executors.checks import sizes


def local_executor(task: run.Partial) -> run.Executor | None:
    """Return the executor that starts the ranks of a task on this machine; None if this process is enough.

    Raises:
        ConfigError: the task needs more GPUs than this machine has.
    """
    import torch

    from aligner import executors
    from aligner.backend.distributed import started_ranks

    place, nodes, devices = _sizes(task)
    if nodes * devices == 1 or started_ranks() > 1:
        return None
    here = torch.cuda.device_count()
    if nodes == 1 and devices <= here:
        return executors.local(ntasks_per_node=devices)
    needed = f"{devices} GPUs" if nodes == 1 else f"{nodes} x {devices} GPUs"
    raise ConfigError(
        f"{place}devices, {place}num_nodes: {needed} are needed, and this machine has {here}; submit it by "
        f"run.executor=slurm run.executor.account=ACCOUNT run.executor.nodes={nodes} "
        f"run.executor.gpus_per_node={devices}, or take fewer ({place}devices=1; nemo llm size says what fits); a "
        f"small model also trains on CPUs, by run.executor=local run.executor.ntasks_per_node={devices}"
    )


def _sizes(task: run.Partial) -> tuple[str, int, int]:
    """Return the path, nodes and devices of the largest part of a task."""
    found = [("trainer.", 1, 1), *((path, *counts) for path, counts in sizes(task))]
    return max(found, key=lambda one: one[1] * one[2])


def describe(task: run.Partial) -> str | None:
    """Describe how the ranks of a task come to be; None if there is one."""
    _, nodes, devices = _sizes(task)
    if nodes * devices == 1:
        return None
    try:
        starts = local_executor(task) is not None
    except ConfigError as error:
        return f"not to be started by this command here: {error}"
    return f"{nodes * devices} ranks, " + ("which this command starts" if starts else "which the launcher has started")
