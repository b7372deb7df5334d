"""Running stages on an executor, with failures raised.

NeMo-Run alone returns normally when a job fails. On this machine and in Docker it starts the next stage after a failed
one; on Slurm it waits forever for a stage that can no longer start.
"""

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from aligner.common import run_folder
from aligner.common.console import log
from aligner.common.errors import REQUEUE
from aligner.executors import checks, failures, sacct_shim
from aligner.executors.local import terminate_children_on_signal

SUCCEEDED = "succeeded.json"
"""File in the folder of a succeeded stage, or beside its output file, with the hash of its recipe."""


def launch(
    stages: Mapping[str, run.Partial], executor: run.Executor, *, name: str = "align", detach: bool = False
) -> str:
    """Run stages one after another on `executor`; their logs appear on the screen.

    In a recipe, a string `stage:NAME` or `stage:NAME/rest` is replaced by the folder of an earlier stage. A stage that
    has succeeded with the same recipe is skipped, unless an earlier stage runs.

    Args:
        stages: name -> recipe, in order.
        executor: executor of all stages.
        name: name of the experiment, for `nemo experiment list`.
        detach: submit to Slurm and return; follow the jobs with `nemo experiment status` and `nemo experiment logs`.

    Returns:
        The experiment's id, for `nemo experiment status ID`; if each stage is its own experiment, the last id. Empty
        if all stages have succeeded before.

    Raises:
        ConfigError: a check fails; nothing was started.
        JobFailed: a stage failed; the message has its state, exit code, node and last log lines.
    """
    checks.check_not_in_job()
    stages = check(stages, executor, name=name)
    remaining = _remaining_stages(stages)
    for stage in stages.keys() - remaining.keys():
        log(f"stage {stage} has succeeded before: {folder_of(stages[stage])}")
    if not remaining:
        return ""
    checks.check_executor(executor, detach=detach)
    if isinstance(executor, run.SlurmExecutor):
        sacct_shim.ensure_sacct(executor, detach=detach)
        return _run(name, remaining, executor, detach=detach)
    identity = ""
    for stage, recipe in remaining.items():
        experiment_name = f"{name}_{stage}" if len(stages) > 1 else name
        with terminate_children_on_signal() if isinstance(executor, run.LocalExecutor) else contextlib.nullcontext():
            identity = _run(experiment_name, {stage: recipe}, executor, detach=False)
    return identity


def dryrun(stages: Mapping[str, run.Partial], executor: run.Executor, *, name: str = "align") -> None:
    """Print what `launch` would submit, and run its checks; nothing is submitted.

    Raises:
        ConfigError: a check of `launch` fails.
    """
    stages = check(stages, executor, name=name)
    with _experiment(name, stages, executor) as experiment:
        folder = Path(experiment._exp_dir)
        experiment.dryrun(log=not isinstance(executor, run.SlurmExecutor), delete_exp_dir=False)
        for script in sorted(folder.glob("*_sbatch.sh")):
            print(script.read_text())
        shipped = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "code" not in p.parts)
        num_code_files = sum(p.is_file() for p in folder.glob("*/code/**/*"))
        log(f"files of the job: {', '.join(shipped)}; and {num_code_files} code files")
        shutil.rmtree(folder)
    checks.check_executor(executor, detach=False)


def check(stages: Mapping[str, run.Partial], executor: run.Executor, *, name: str = "align") -> dict[str, run.Partial]:
    """Check stages without asking the cluster; return them with each `stage:NAME` replaced by a folder.

    Raises:
        ConfigError: a name, a recipe or a number of ranks is invalid.
    """
    resolved = _resolve_stage_references(stages)
    checks.check_recipes(name, resolved, executor)
    return resolved


def _run(name: str, stages: Mapping[str, run.Partial], executor: run.Executor, *, detach: bool) -> str:
    recorded = {stage: len(run_folder.job_files(folder_of(recipe))) for stage, recipe in stages.items()}
    with _experiment(name, stages, executor) as experiment, failures.translate_submission_errors():
        try:
            experiment.run(detach=detach)
        except BaseException:
            for job in experiment.jobs:  # jobs submitted before the refused one
                job.cancel(experiment._runner)
            raise
    if detach:
        return experiment._id
    statuses = failures.wait_until_final(experiment, executor)
    for stage, recipe in stages.items():
        # A job that is refused before it begins writes no record; the newest is then that of an earlier one.
        wrote = len(run_folder.job_files(folder_of(recipe))) > recorded[stage]
        ended = run_folder.ending(folder_of(recipe)) if wrote else None
        if failures.state(statuses[stage]) != "SUCCEEDED":
            if ended == "preempted" and isinstance(executor, run.LocalExecutor):
                # torchrun makes 1 of every exit code.
                log(f"stage {stage} has saved and is not complete; run the same again to resume")
                raise SystemExit(REQUEUE)
            raise failures.JobFailed(failures.report(stage, statuses, experiment, executor))
        if ended not in ("success", None):
            raise failures.JobFailed(
                f"stage {stage}: its job ended with code 0, but its run has not come to its end ({ended}): a callback "
                f"or a script ended it early; see {folder_of(recipe)}/provenance"
            )
        with contextlib.suppress(OSError):  # a folder on another machine
            _success_file(recipe).write_text(json.dumps({"recipe": _recipe_hash(recipe)}))
    return experiment._id


@contextlib.contextmanager
def _experiment(name: str, stages: Mapping[str, run.Partial], executor: run.Executor) -> Iterator[run.Experiment]:
    options = {"log_level": "WARNING", "enable_goodbye_message": False, "skip_status_at_exit": True}
    with run.Experiment(name, executor=executor, **options) as experiment:  # type: ignore[arg-type]
        previous: list[str] = []
        for stage, recipe in stages.items():
            previous = [experiment.add(recipe, name=stage, tail_logs=True, dependencies=previous)]
        yield experiment


def _remaining_stages(stages: Mapping[str, run.Partial]) -> dict[str, run.Partial]:
    """Return the stages from the first one that has not succeeded with the same recipe."""
    names = list(stages)
    for i, name in enumerate(names):
        try:
            succeeded = (
                json.loads(_success_file(stages[name]).read_text())["recipe"]
                if folder_of(stages[name]).exists()
                else None
            )
        except (OSError, ValueError, KeyError):
            succeeded = None
        if succeeded != _recipe_hash(stages[name]):
            return {name: stages[name] for name in names[i:]}
    return {}


def _recipe_hash(recipe: run.Partial) -> str:
    return hashlib.sha256(ZlibJSONSerializer().serialize(recipe).encode()).hexdigest()[:16]


def _success_file(recipe: run.Partial) -> Path:
    """Return the path of a stage's `succeeded.json`."""
    output = folder_of(recipe)
    return output / SUCCEEDED if output.is_dir() else output.with_name(f"{output.name}.{SUCCEEDED}")


def folder_of(recipe: run.Partial) -> Path:
    """Return the output of a stage: the folder of its run, or the path in `output`."""
    log: Any = getattr(recipe, "log", None)
    if log is not None:
        return Path(log.log_dir or "nemo_experiments").expanduser() / log.name
    return Path(str(getattr(recipe, "output", None) or "nowhere"))


def _resolve_stage_references(stages: Mapping[str, run.Partial]) -> dict[str, run.Partial]:
    """Return the recipes with each `stage:NAME` replaced by the folder of that earlier stage."""
    resolved: dict[str, run.Partial] = {}

    def replace(text: str) -> str:
        if not text.startswith("stage:"):
            return text
        name, slash, rest = text.removeprefix("stage:").partition("/")
        checks.check_stage_exists(text, name, list(resolved))
        return f"{folder_of(resolved[name])}{slash}{rest}"

    for stage, recipe in stages.items():
        resolved[stage] = checks.map_strings(copy.deepcopy(recipe), replace)
    return resolved
