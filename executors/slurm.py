"""Executor: a Slurm cluster, from its login node or over SSH, with or without containers."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, Optional

import nemo_run as run

from aligner.common.errors import REQUEUE, ConfigError
from aligner.executors import packaging, values

PREEMPTED = (REQUEUE, 128 + signal.SIGTERM, 128 + signal.SIGUSR1)
"""Exit codes of a preempted job: it has saved, or had not yet installed its signal handler."""

# NeMo-Run's script requeues a job after any exit code. A job with invalid data would fail again and again, and a
# requeued job loses its error message. This function therefore intercepts `scontrol requeue`.
REQUEUE_FILTER = """
scontrol() {
  case "$1:$exitcode" in
    CODES) ;;
    requeue:*) echo "[align] not requeued: exit code $exitcode, on $SLURM_JOB_NODELIST"; return 0 ;;
  esac
  command scontrol "$@"
}
trap 'exit ${exitcode:-$?}' EXIT
"""


def _requeue_codes(launcher: str | None) -> list[int]:
    """Return the exit codes after which a job is requeued; the fault-tolerance launcher exits with 1 on any failure."""
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
    """Run as a Slurm job of `nodes` x `ntasks_per_node` processes, each started by srun.

    The job receives SIGTERM `signal_delay_s` seconds before the time limit, and on preemption. It then saves a
    checkpoint and is requeued, at most `retries` times. A job is also requeued after a node failure, but not after an
    error.

    Args:
        account: Slurm account, as in `sbatch --account`.
        partition: partition; None: the cluster's default.
        nodes: number of nodes; equal to the recipe's `trainer.num_nodes`.
        gpus_per_node: GPUs per node; None if the cluster does not count GPUs.
        ntasks_per_node: processes per node, equal to `trainer.devices`; None: one per GPU, or one without GPUs.
        time: time limit of a job, `[D-]HH:MM:SS`; a longer run takes several jobs.
        signal_delay_s: seconds between the signal and the time limit, for the last step and the save.
        retries: maximum number of requeues.
        exclusive: reserve whole nodes.
        exclude: nodes to exclude, `n3,n[7-9]`.
        mem: memory per node, `64G`; "0": all.
        container_image: container image for pyxis; None: no container; the job uses this Python or what `setup_lines`
            activates.
        container_mounts: mounts, `/data:/data`; without `ssh`, the current folder is mounted, too.
        setup_lines: bash lines before the job, `module load ...`, `source venv/bin/activate`.
        env_vars: environment variables of the job; secrets are refused (sbatch passes on exported variables).
        sbatch: additional sbatch flags, `{"qos": "high"}`.
        ssh: `user@host[:port]` of a login node; None: this machine is a login node.
        ssh_identity: private SSH key.
        job_dir: folder on the cluster for scripts and logs; required with `ssh`.
        launcher: None: srun starts the ranks; "ft": NVIDIA's fault-tolerance launcher on each node, which restarts dead
            or hanging ranks. With "ft" all failures have the same exit code, so only `retries` limits the requeues.

    Raises:
        ConfigError: an argument is invalid.
    """
    texts = {"account": account, "partition": partition, "exclude": exclude, "mem": mem, "ssh": ssh}
    more = {"container_image": container_image, "ssh_identity": ssh_identity, "job_dir": job_dir}
    _check_texts({**texts, **more}, sbatch, [*(setup_lines or []), *(container_mounts or [])])
    _check_arguments(time, signal_delay_s, retries, ssh, job_dir, launcher)
    flags = {name: values.flag(value) for name, value in (sbatch or {}).items()}
    tasks = ntasks_per_node or gpus_per_node or 1
    executor = run.SlurmExecutor(
        account=account,
        job_name_prefix=_name_prefix(account),
        partition=partition,
        nodes=nodes,
        ntasks_per_node=tasks,
        gpus_per_node=gpus_per_node,
        time=time,
        # Signal the ranks only: the batch script must survive to requeue the job.
        signal=f"TERM@{signal_delay_s}",
        exclusive=exclusive or None,
        exclude=exclude,
        mem=mem,
        container_image=None if container_image is None else values.quoted(container_image),
        additional_parameters={"overcommit": True, "kill_on_invalid_dep": "yes", **flags},
        tunnel=_tunnel(ssh, ssh_identity, job_dir),
        **_job_environment(container_image, container_mounts, env_vars, setup_lines, ssh, launcher),
        launcher=launcher,
        poll_estimated_start_time=False,
    )
    executor.retries = retries
    return executor


def _job_environment(
    image: str | None,
    container_mounts: list[str] | None,
    env_vars: dict[str, str] | None,
    setup_lines: list[str] | None,
    ssh: str | None,
    launcher: str | None,
) -> dict[str, Any]:
    """Return code, folder, environment and script of a job, as arguments of run.SlurmExecutor."""
    folder, (packager, commit_vars) = os.getcwd(), packaging.code()
    values.check_one_line("container_mounts", folder)
    environment, srun_args = commit_vars | _environment(env_vars), []
    mounts = [values.quoted_mount("container_mounts", mount) for mount in container_mounts or []]
    lines = [REQUEUE_FILTER.replace("CODES", "|".join(f"requeue:{code}" for code in _requeue_codes(launcher)))]
    if image is not None:
        # Python starts in the folder of the shipped code; the image keeps its own PYTHONPATH.
        mounts += [values.quoted_mount("container_mounts", f"{folder}:{folder}")] if ssh is None else []
    elif ssh is None:
        # Shipped code comes before installed code; paths are relative to the current folder.
        python_path = ":".join(filter(None, ["/nemo_run/code", environment.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1"}
        srun_args.append(f"--chdir={values.quoted(folder)}")
        lines.append(f"export PATH={values.quoted(str(Path(sys.executable).parent))}:$PATH")
    return {
        "packager": packager,
        "env_vars": environment,
        "container_mounts": mounts,
        # Without this list, the image's own values override exported ones.
        "container_env": sorted(environment) if image else None,
        # When a rank has saved and ended, srun must not kill the others: NeMo-Run's `--wait` gives them 60 s to end.
        "srun_args": ["--label", "--kill-on-bad-exit=0", *srun_args],
        "setup_lines": "\n".join([*lines, *(setup_lines or [])]),
    }


def _check_texts(texts: dict[str, str | None], sbatch: dict[str, Any] | None, others: list[str]) -> None:
    """Refuse line breaks in what becomes a line of the script, secrets, and names of flags that are none."""
    for flag in sbatch or {}:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", flag):
            raise ConfigError(f"run.executor.sbatch: {flag!r} is no flag of sbatch; write it as 'qos'")
    for field, text in {**texts, **{f"sbatch.{flag}": value for flag, value in (sbatch or {}).items()}}.items():
        if text is not None:
            values.check_one_line(field, text)
            values.refuse_secret(field, text)
    for field in ("account", "partition", "exclude", "mem"):
        if "\\" in (texts[field] or ""):
            raise ConfigError(f"run.executor.{field}: {texts[field]!r} has a backslash, which Slurm has in none")
    for text in others:
        values.refuse_secret("setup_lines, container_mounts", text)


def _name_prefix(account: str) -> str | None:
    """Return the beginning of job names and log files; None: NeMo-Run's own, which has the account as it is."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", account)
    return None if plain == account else f"{plain}-{plain.split('_')[-1]}."


def _check_arguments(
    time: str, signal_delay_s: int, retries: int, ssh: str | None, job_dir: str | None, launcher: str | None
) -> None:
    seconds = seconds_of(time)
    if seconds <= signal_delay_s:
        raise ConfigError(
            f"run.executor.signal_delay_s: {signal_delay_s} s before the end of a job of {time}; it would "
            "be told to end at once. Lower it, or raise time"
        )
    if ssh is not None and job_dir is None:
        raise ConfigError("run.executor.job_dir: missing; with ssh, name a folder on the cluster for scripts and logs")
    if job_dir is not None:
        values.check_folder("run.executor.job_dir", job_dir)
    if launcher not in (None, "ft"):
        raise ConfigError(
            f"run.executor.launcher: {launcher!r} is neither None nor ft; srun starts the ranks, and torchrun would "
            "hide from Slurm that they saved"
        )
    if launcher == "ft" and retries < 1:
        raise ConfigError("run.executor.retries: 0, and with launcher=ft Slurm would see every failure as a success")


def seconds_of(time: str) -> int:
    """Convert a Slurm time limit, `[D-]HH[:MM[:SS]]` or `MM[:SS]`, to seconds.

    Raises:
        ConfigError: the time limit is invalid.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        raise ConfigError(f"run.executor.time: {time!r} is not a time; write [D-]HH:MM:SS")
    # 90: minutes; 90:00: minutes and seconds; 1-2: days and hours.
    numbers = [0, *map(int, parts)] if not dash and len(parts) < 3 else list(map(int, parts))
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _environment(env_vars: dict[str, str] | None) -> dict[str, str]:
    """Return quoted variables: NeMo-Run writes them into the script in capitals and without quotes."""
    values.check_env_vars(env_vars)
    for name, value in (env_vars or {}).items():
        if name != name.upper():
            raise ConfigError(
                f"run.executor.env_vars: {name}, but NeMo-Run exports names in capitals only; use setup_lines"
            )
        if "\n" in str(value):
            raise ConfigError(f"run.executor.env_vars: {name} has more than one line; use setup_lines")
    # NeMo-Run replaces `$head_node_ip_var` and others in them, and reads $$ as one $.
    return {name: values.quoted(str(value)).replace("$", "$$") for name, value in (env_vars or {}).items()}


def _tunnel(ssh: str | None, identity: str | None, job_dir: str | None) -> Any:
    if ssh is None:
        return run.LocalTunnel(job_dir="")
    # NeMo-Run writes both into commands without quotes.
    match = re.fullmatch(r"(\w[\w.+-]*)@([A-Za-z0-9][A-Za-z0-9.-]*)(?::(\d+))?", ssh, re.ASCII)
    if match is None:
        raise ConfigError(f"run.executor.ssh: {ssh!r}; write user@host or user@host:port")
    if identity is not None and not Path(identity).expanduser().is_file():
        raise ConfigError(f"run.executor.ssh_identity: there is no {identity}; name a private key")
    user, host, port = match.groups()
    key = str(Path(identity).expanduser()) if identity else None
    if key:
        values.check_folder("run.executor.ssh_identity", key)
    return run.SSHTunnel(host=host, user=user, port=int(port) if port else None, identity=key, job_dir=str(job_dir))
