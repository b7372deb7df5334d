"""Executors: functions that return a NeMo-Run executor, and `launch`, which runs stages on it.

run.run(recipe, executor=executors.slurm(account="acct", partition="gpu", gpus_per_node=8))
executors.launch({"sft": sft, "dpo": dpo}, executors.local(ntasks_per_node=2))
"""

from aligner.executors import sacct_shim
from aligner.executors.docker import docker
from aligner.executors.failures import JobFailed
from aligner.executors.launch import check, dryrun, launch
from aligner.executors.local import local
from aligner.executors.profiles import profile
from aligner.executors.slurm import slurm

__all__ = ["JobFailed", "check", "docker", "dryrun", "launch", "local", "profile", "sacct_shim", "slurm"]
