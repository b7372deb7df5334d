"""A Slurm cluster, from its login node or over SSH, in containers or without."""

import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Optional

import nemo_run as run

from aligner.common import secret_names
from aligner.common.errors import REQUEUE, ConfigError
from aligner.executors import packaging

PREEMPTED = (REQUEUE, 128 + signal.SIGTERM, 128 + signal.SIGUSR1)
"""Exit codes of a job that was told to end: it has saved, or could not listen yet."""

# NeMo-Run's script puts a job back into the queue whatever it ended with. One whose data is wrong would fail there
# again and again, and one that is put back loses its own message; so its `scontrol requeue` is answered here.
ONLY_IF_TOLD = """
scontrol() {
  case "$1:$exitcode" in
    CODES) ;;
    requeue:*) echo "[align] not put back into the queue: exit code $exitcode, on $SLURM_JOB_NODELIST"; return 0 ;;
  esac
  command scontrol "$@"
}
trap 'exit ${exitcode:-$?}' EXIT
"""


def _codes(launcher: str | None) -> list[int]:
    """Exit codes of a job that is to come back; the fault-tolerance launcher tells all that went wrong by 1."""
    return [*PREEMPTED, *([1] if launcher == "ft" else [])]


def slurm(
    *,
    account: str,
    partition: Optional[str] = None,
    nodes: int = 1,
    gpus_per_node: Optional[int] = None,
    ntasks_per_node: Optional[int] = None,
    time: str = "04:00:00",
    signal_delay_s: int = 120,
    retries: int = 20,
    exclusive: bool = True,
    exclude: Optional[str] = None,
    mem: Optional[str] = None,
    container_image: Optional[str] = None,
    container_mounts: Optional[list[str]] = None,
    setup_lines: Optional[list[str]] = None,
    env_vars: Optional[dict[str, str]] = None,
    sbatch: Optional[dict[str, Any]] = None,
    ssh: Optional[str] = None,
    ssh_identity: Optional[str] = None,
    job_dir: Optional[str] = None,
    launcher: Optional[str] = None,
) -> run.SlurmExecutor:
    """A job of `nodes` x `ntasks_per_node` processes, each started by srun, which come back when they were preempted.

    `signal_delay_s` seconds before the time limit, and when it is preempted, the job is told to end; it saves, and is put back
    into the queue, at most `retries` times; so is a job whose node failed. One that ends with an error is not.

    Args:
        account: who pays, as `sbatch --account`.
        partition: where; None: the cluster's default.
        nodes: machines; as many as the recipe's `trainer.num_nodes`.
        gpus_per_node: of each; None where the cluster counts none.
        ntasks_per_node: processes on each, as many as `trainer.devices`; None: one for each GPU, or one.
        time: limit of one job, `[D-]HH:MM:SS`; a longer run is several jobs.
        signal_delay_s: seconds for the last step and the save.
        retries: how often a job is put back.
        exclusive: whether it has its nodes for itself.
        exclude: nodes that it must not run on, `n3,n[7-9]`.
        mem: memory of a node, `64G`; "0": all.
        container_image: for pyxis; None: no container, this Python or what `setup_lines` activates.
        container_mounts: `/data:/data`; without ssh the folder where this is called is mounted, too.
        setup_lines: lines of bash before the job, `module load ...`, `source venv/bin/activate`.
        env_vars: environment of the job; none of them a secret (sbatch passes on what is exported here).
        sbatch: further flags, `{"qos": "high"}`.
        ssh: `user@host[:port]` of a login node; None: this machine is one.
        ssh_identity: private key for it.
        job_dir: folder on the cluster for scripts and logs; with `ssh`.
        launcher: None: srun starts the ranks; "ft": NVIDIA's fault-tolerance launcher on each node, which starts ranks
            anew that died or hang; it tells all failures alike, so that `retries` alone bounds them.

    Raises:
        ConfigError: an argument is not as it must be.
    """
    _check(time, signal_delay_s, retries, ssh, job_dir, launcher)
    ranks = ntasks_per_node or gpus_per_node or 1
    executor = run.SlurmExecutor(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=ranks,
        gpus_per_node=gpus_per_node,
        time=time,
        # To the ranks, not to the script, which is to live on and put the job back.
        signal=f"TERM@{signal_delay_s}",
        exclusive=exclusive or None,
        exclude=exclude,
        mem=mem,
        container_image=container_image,
        additional_parameters={"overcommit": True, "kill_on_invalid_dep": "yes", **(sbatch or {})},
        tunnel=_tunnel(ssh, ssh_identity, job_dir),
        **_surroundings(container_image, container_mounts, env_vars, setup_lines, ssh, launcher),
        launcher=launcher,
        poll_estimated_start_time=False,
    )
    executor.retries = retries
    return executor


def _surroundings(
    image: str | None,
    container_mounts: list[str] | None,
    env_vars: dict[str, str] | None,
    setup_lines: list[str] | None,
    ssh: str | None,
    launcher: str | None,
) -> dict[str, Any]:
    """Code, folder, environment and script around a job, as arguments of run.SlurmExecutor."""
    here, (packager, names) = os.getcwd(), packaging.code()
    environment, mounts, arguments = names | _environment(env_vars), list(container_mounts or []), []
    lines = [ONLY_IF_TOLD.replace("CODES", "|".join(f"requeue:{code}" for code in _codes(launcher)))]
    if image is not None:
        # Python begins in the folder of the code that was shipped, and the image keeps its own PYTHONPATH.
        mounts += [f"{here}:{here}"] if ssh is None else []
    elif ssh is None:
        # What was shipped comes before what is installed; relative paths are those of this folder.
        shipped = ":".join(filter(None, ["/nemo_run/code", environment.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": shipped, "PYTHONSAFEPATH": "1"}
        arguments.append(f"--chdir={shlex.quote(here)}")
        lines.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    return {
        "packager": packager,
        "env_vars": environment,
        "container_mounts": mounts,
        # An image's own values would come before those that are exported.
        "container_env": sorted(environment) if image else None,
        # A rank that has saved and ended must not have srun kill the others, which are just about to: they have the
        # 60 s that NeMo-Run's `--wait` leaves them.
        "srun_args": ["--label", "--kill-on-bad-exit=0", *arguments],
        "setup_lines": "\n".join([*lines, *(setup_lines or [])]),
    }


def _check(
    time: str, signal_delay_s: int, retries: int, ssh: str | None, job_dir: str | None, launcher: str | None
) -> None:
    seconds = seconds_of(time)
    if seconds <= signal_delay_s:
        raise ConfigError(
            f"run.executor.signal_delay_s: {signal_delay_s} s before the end of a job of {time}; it would be told to end at once. "
            "Lower it, or raise time"
        )
    if ssh is not None and job_dir is None:
        raise ConfigError("run.executor.job_dir: missing; with ssh, name a folder on the cluster for scripts and logs")
    if launcher not in (None, "ft"):
        raise ConfigError(
            f"run.executor.launcher: {launcher!r} is neither None nor ft; srun starts the ranks, and torchrun would "
            "hide from Slurm that they saved"
        )
    if launcher == "ft" and retries < 1:
        raise ConfigError("run.executor.retries: 0, and with launcher=ft Slurm would see every failure as a success")


def seconds_of(time: str) -> int:
    """A Slurm time limit, `[D-]HH[:MM[:SS]]` or `MM[:SS]`, in seconds.

    Raises:
        ConfigError: it is none.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        raise ConfigError(f"run.executor.time: {time!r} is not a time; write [D-]HH:MM:SS")
    # 90 is minutes, 90:00 minutes and seconds, 1-2 days and hours.
    numbers = [0, *map(int, parts)] if not dash and len(parts) < 3 else list(map(int, parts))
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _environment(env_vars: dict[str, str] | None) -> dict[str, str]:
    """Variables as NeMo-Run writes them into the script: in capitals and unquoted."""
    secret_names.refuse(env_vars)
    for name, value in (env_vars or {}).items():
        if name != name.upper():
            raise ConfigError(
                f"run.executor.env_vars: {name}, but NeMo-Run exports names in capitals only; use setup_lines"
            )
        if "\n" in str(value):
            raise ConfigError(f"run.executor.env_vars: {name} has more than one line; use setup_lines")
    return {name: shlex.quote(str(value)) for name, value in (env_vars or {}).items()}


def _tunnel(ssh: str | None, identity: str | None, job_dir: str | None) -> Any:
    if ssh is None:
        return run.LocalTunnel(job_dir="")
    found = re.fullmatch(r"([^@\s]+)@([^:\s]+)(?::(\d+))?", ssh)
    if found is None:
        raise ConfigError(f"run.executor.ssh: {ssh!r}; write user@host or user@host:port")
    if identity is not None and not Path(identity).expanduser().is_file():
        raise ConfigError(f"run.executor.ssh_identity: there is no {identity}; name a private key")
    user, host, port = found.groups()
    key = str(Path(identity).expanduser()) if identity else None
    return run.SSHTunnel(host=host, user=user, port=int(port) if port else None, identity=key, job_dir=str(job_dir))
