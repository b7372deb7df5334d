"""Failure reports of jobs: state, exit code, node, last log lines."""

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nemo_run as run

from aligner.common.errors import REQUEUE, ConfigError
from aligner.common.secrets_filter import hidden, hidden_words


class JobFailed(RuntimeError):
    """A stage failed; later stages were not started."""


@contextlib.contextmanager
def translate_submission_errors() -> Iterator[None]:
    """Translate errors of sbatch, ssh and the disk into one ConfigError.

    Raises:
        ConfigError: submission failed; the message contains the output of the command.
    """
    from invoke.exceptions import UnexpectedExit

    try:
        yield
    except UnexpectedExit as error:
        output = " ".join((error.result.stderr or error.result.stdout or "").split())
        raise ConfigError(f"run.executor: not submitted, {error.result.command.split()[0]} says: {output}") from None
    except OSError as error:
        raise ConfigError(f"run.executor: not submitted: {error}") from None


ALIVE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "REQUEUE_HOLD")
"""Slurm states of unfinished jobs."""

StageStatuses = Mapping[str, Mapping[str, Any]]
"""NeMo-Run's record of each stage: status, job ID, folder."""


def state(status: Mapping[str, Any]) -> str:
    """Return the state of a stage, as `SUCCEEDED`."""
    return str(status.get("status", "UNKNOWN")).rsplit(".", 1)[-1]


def wait_until_final(experiment: run.Experiment, executor: run.Executor) -> StageStatuses:
    """Wait until no stage can change; return the statuses. A job being requeued can look finished."""
    unknown = 0
    while True:
        statuses: StageStatuses = experiment.status(return_dict=True) or {}
        alive = isinstance(executor, run.SlurmExecutor) and any(
            _job_fields(executor, status["job_id"]).get("JobState", "") in ALIVE
            for status in statuses.values()
            if status["job_id"]
        )
        unknown = unknown + 1 if "UNKNOWN" in map(state, statuses.values()) else 0
        if not alive and unknown in (0, 12):
            return statuses
        time.sleep(5)


def _job_fields(executor: run.SlurmExecutor, job: str) -> dict[str, str]:
    """Return the fields of a job in `scontrol`; empty if Slurm has forgotten the job."""
    output = executor.tunnel.run(f"scontrol --oneliner show job {shlex.quote(job)}", warn=True, in_stream=False).stdout
    return dict(re.findall(r"(\w+)=(\S*)", output))


def report(stage: str, statuses: StageStatuses, experiment: run.Experiment, executor: run.Executor) -> str:
    """Return the error message for a failed stage."""
    status, states = statuses[stage], {name: state(s) for name, s in statuses.items()}
    folder = Path(status["local_dir"])
    ending = (
        _slurm_ending(executor, status["job_id"])
        if isinstance(executor, run.SlurmExecutor)
        else _container_ending(folder)
    )
    lines = [f"stage {stage!r} ended as {states[stage]}{ending}"]
    not_begun = [name for name, other in states.items() if name != stage and other in ("CANCELLED", "UNSUBMITTED")]
    if not_begun:
        lines.append(f"not begun: {', '.join(not_begun)}")
    log = _newest_log(folder, status["job_id"])
    if log is not None:
        lines += [f"its log, {log}, ends with:", *(f"  {line}" for line in _log_tail(log))]
    lines.append(f"all of it: nemo experiment logs {experiment._id} {list(states).index(stage)}")
    command = shlex.join(hidden_words([Path(sys.argv[0]).name, *sys.argv[1:]]))
    lines.append(f"after fixing the error, the same command resumes where it stopped: {command}")
    return hidden("\n".join(lines))


def _slurm_ending(executor: run.SlurmExecutor, job: str) -> str:
    """Describe job ID, exit code and node, as far as Slurm still lists the job."""
    fields = _job_fields(executor, job)
    if not fields:
        return f" (job {job})"
    code, _, signal = fields.get("ExitCode", "").partition(":")
    ending = f"exit code {code}" + (f", signal {signal}" if signal not in ("", "0") else "")
    if code == str(REQUEUE):
        ending += (
            f": preempted for the {int(fields.get('Restarts', 0)) + 1}th time, and not requeued any more; it has saved"
        )
    return f" (job {job}, {ending}, on {fields.get('NodeList', '?')}; {fields.get('Reason', '')})"


def _container_ending(folder: Path) -> str:
    """Describe the exit code of a container, from NeMo-Run's status file."""
    for file in folder.glob("status_*.out"):
        code = re.search(r'"exit_code": "(\d+)"', file.read_text())
        if code:
            return f" (exit code {code[1]})"
    return ""


def _log_tail(log: Path) -> list[str]:
    """Return the last 20 lines of a log, without the lines that torchrun adds after a rank has ended."""
    lines = log.read_text(errors="replace").splitlines()
    ended = (i for i, line in enumerate(lines) if "torch/distributed/elastic/multiprocessing/api.py" in line)
    return lines[: next(ended, len(lines))][-20:]


def _newest_log(folder: Path, job: str) -> Path | None:
    """Return a job's newest log: of Slurm ranks, their batch script, a container, or local processes."""
    for pattern in (f"log-*_{job}_*.out", f"sbatch_*_{job}.out", "log_*.out", f"**/{job}/**/combined.log"):
        logs = [path for path in folder.glob(pattern) if path.stat().st_size]
        if logs:
            return max(logs, key=lambda path: path.stat().st_mtime)
    return None
