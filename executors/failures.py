"""What became of a job: its state, and what it said last, where and how it ended."""

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


class JobFailed(RuntimeError):
    """A stage did not succeed; later ones were not started."""


@contextlib.contextmanager
def of_submission() -> Iterator[None]:
    """Say in one message what sbatch, ssh or the disk refuses.

    Raises:
        ConfigError: with what they said.
    """
    from invoke.exceptions import UnexpectedExit

    try:
        yield
    except UnexpectedExit as error:
        said = " ".join((error.result.stderr or error.result.stdout or "").split())
        raise ConfigError(f"run.executor: not submitted, {error.result.command.split()[0]} says: {said}") from None
    except OSError as error:
        raise ConfigError(f"run.executor: not submitted: {error}") from None


ALIVE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "REQUEUE_HOLD")
"""States in which Slurm has not done with a job."""

Found = Mapping[str, Mapping[str, Any]]
"""What NeMo-Run says of each stage: its status, job, folder."""


def state(said: Mapping[str, Any]) -> str:
    """The state of a stage, as `SUCCEEDED`."""
    return str(said.get("status", "UNKNOWN")).rsplit(".", 1)[-1]


def wait_until_final(experiment: run.Experiment, executor: run.Executor) -> Found:
    """What is said of all stages once none can change: a job between two of its lives may look like one that ended."""
    unknown = 0
    while True:
        found: Found = experiment.status(return_dict=True) or {}
        alive = isinstance(executor, run.SlurmExecutor) and any(
            _fields(executor, said["job_id"]).get("JobState", "") in ALIVE for said in found.values() if said["job_id"]
        )
        unknown = unknown + 1 if "UNKNOWN" in map(state, found.values()) else 0
        if not alive and unknown in (0, 12):
            return found
        time.sleep(5)


def _fields(executor: run.SlurmExecutor, job: str) -> dict[str, str]:
    """What Slurm still knows of a job."""
    found = executor.tunnel.run(f"scontrol --oneliner show job {job}", warn=True, in_stream=False).stdout
    return dict(re.findall(r"(\w+)=(\S*)", found))


def report(stage: str, found: Found, experiment: run.Experiment, executor: run.Executor) -> str:
    """What a user needs to know of a stage that did not succeed."""
    said, states = found[stage], {name: state(each) for name, each in found.items()}
    folder = Path(said["local_dir"])
    how = _slurm(executor, said["job_id"]) if isinstance(executor, run.SlurmExecutor) else _here(folder)
    lines = [f"stage {stage!r} ended as {states[stage]}{how}"]
    never = [name for name, state in states.items() if name != stage and state in ("CANCELLED", "UNSUBMITTED")]
    if never:
        lines.append(f"not begun: {', '.join(never)}")
    log = _log(folder, said["job_id"])
    if log is not None:
        lines += [f"its log, {log}, ends with:", *(f"  {line}" for line in _tail(log))]
    lines.append(f"all of it: nemo experiment logs {experiment._id} {list(states).index(stage)}")
    again = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines.append(f"when what is wrong is mended, the same command goes on where it was: {again}")
    return "\n".join(lines)


def _slurm(executor: run.SlurmExecutor, job: str) -> str:
    """Node and exit code of a job, as Slurm still knows them."""
    fields = _fields(executor, job)
    if not fields:
        return f" (job {job})"
    code, _, signal = fields.get("ExitCode", "").partition(":")
    ended = f"exit code {code}" + (f", signal {signal}" if signal not in ("", "0") else "")
    if code == str(REQUEUE):
        ended += f": preempted for the {int(fields.get('Restarts', 0)) + 1}th time, and put back no more; it has saved"
    return f" (job {job}, {ended}, on {fields.get('NodeList', '?')}; {fields.get('Reason', '')})"


def _here(folder: Path) -> str:
    """Exit code of a container, which NeMo-Run has it write down."""
    for file in folder.glob("status_*.out"):
        code = re.search(r'"exit_code": "(\d+)"', file.read_text())
        if code:
            return f" (exit code {code[1]})"
    return ""


def _tail(log: Path) -> list[str]:
    """The last lines of a log, without those that torchrun adds when a rank has ended."""
    lines = log.read_text(errors="replace").splitlines()
    ended = (i for i, line in enumerate(lines) if "torch/distributed/elastic/multiprocessing/api.py" in line)
    return lines[: next(ended, len(lines))][-20:]


def _log(folder: Path, job: str) -> Path | None:
    """The newest of a job's logs: of Slurm's ranks or their script, of a container, of this machine's processes."""
    for pattern in (f"log-*_{job}_*.out", f"sbatch_*_{job}.out", "log_*.out", f"**/{job}/**/combined.log"):
        found = [path for path in folder.glob(pattern) if path.stat().st_size]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    return None
