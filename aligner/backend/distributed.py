"""Process groups and environment of a run, set up and torn down for several runs in one process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from megatron.core import num_microbatches_calculator, parallel_state

from aligner.backend import kernels, patches
from aligner.common.errors import AlignError, ConfigError

_runs = itertools.count()
Value = TypeVar("Value")


def fresh_store(cluster: ClusterEnvironment | None) -> torch.distributed.Store | None:
    """Create a rendezvous store; None selects torch's own rendezvous, which works once per process.

    A second process group would read the first group's addresses from the launcher's store and wait forever.
    """
    number = next(_runs)
    assert cluster is not None
    if number == 0 or cluster.world_size() == 1:
        return None
    if cluster.creates_processes_externally and "TORCHELASTIC_RUN_ID" in os.environ:
        store, _, _ = next(torch.distributed.rendezvous("env://"))
        return torch.distributed.PrefixStore(f"nemo-align-{number}", store)
    port = cluster.main_port + number
    return torch.distributed.TCPStore(
        cluster.main_address, port, cluster.world_size(), is_master=cluster.global_rank() == 0
    )


def started_ranks() -> int:
    """Return how many processes the launcher started: torchrun, srun, or one.

    Raises:
        ConfigError: Slurm was asked for several tasks, and this process is none that srun started; it would wait for
            the others for ever.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    asked = int(os.environ.get("SLURM_NTASKS", 1))
    if asked == 1 or "SLURM_STEP_NUM_TASKS" in os.environ:
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", asked))
    raise ConfigError(
        f"SLURM_NTASKS: {asked} tasks were asked for, but one process is here, which srun did not start; start it by "
        "srun, or unset SLURM_NTASKS SLURM_NTASKS_PER_NODE"
    )


@contextlib.contextmanager
def rank_zero_first() -> Iterator[bool]:
    """Run a block on rank 0, outside of Megatron: yield True there, and False on the other ranks, which wait.

    If rank 0 fails, the other ranks fail in the barrier.

    Raises:
        ConfigError: see `started_ranks`.
    """
    started_ranks()
    cluster = _cluster()
    if cluster is None:
        yield True
        return
    with _gloo_group(cluster) as rank:
        yield rank == 0
        torch.distributed.barrier()


def of_rank_zero(function: Callable[[], Value]) -> Value:
    """Return on every rank what a function returns on rank 0, outside of Megatron; raise what it raises there.

    Clocks and time zones of machines differ, file systems show files later elsewhere, and one reading is enough.
    """
    cluster = _cluster()
    if cluster is None:
        return function()
    result: list[Any] = [None, None]
    with _gloo_group(cluster) as rank:
        if rank == 0:
            try:
                result[0] = function()
            except AlignError as error:
                result[1] = error
        torch.distributed.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _cluster() -> ClusterEnvironment | None:
    """Return the launcher of this process; None if there is one rank."""
    cluster = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    return None if cluster is None or cluster.world_size() == 1 else cluster


@contextlib.contextmanager
def _gloo_group(cluster: ClusterEnvironment) -> Iterator[int]:
    """Set up a process group of all ranks for a block; yield the rank."""
    store = fresh_store(cluster)
    rendezvous: dict[str, Any] = {"store": store} if store is not None else {"init_method": "env://"}
    if store is None:
        os.environ |= {"MASTER_ADDR": cluster.main_address, "MASTER_PORT": str(cluster.main_port)}
    rank, world = cluster.global_rank(), cluster.world_size()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=7), **rendezvous)
    try:
        yield rank
    finally:
        torch.distributed.destroy_process_group()


LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
PRESERVED = (*LAUNCHER, *kernels.SET, "OMP_NUM_THREADS")


@contextlib.contextmanager
def preserved_environment() -> Iterator[None]:
    """Restore the environment variables and the number of threads that a run sets.

    Otherwise a process started later, for example from a notebook, would use this run's port, and the next run its
    kernels.
    """
    before, num_threads = {name: os.environ.get(name) for name in PRESERVED}, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def destroy_distributed() -> None:
    """Destroy the process groups of Megatron and torch.distributed."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        patches.forget_process_groups()
        torch.distributed.destroy_process_group()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    gc.collect()
