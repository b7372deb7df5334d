"""Running stages on an executor so that a failure is a failure.

NeMo-Run alone returns as if all were well when a job failed, on this machine and in Docker starts the next stage after
a failed one, and on Slurm waits for ever for a stage that can no longer begin.
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

from aligner.common.console import log
from aligner.executors import checks, failures, sacct_shim
from aligner.executors.local import terminate_children_on_signal

SUCCEEDED = "succeeded.json"
"""In the folder of a stage that succeeded, or beside its file: which recipe did."""


def launch(
    stages: Mapping[str, run.Partial], executor: run.Executor, *, name: str = "align", detach: bool = False
) -> str:
    """Run stages one after another, each on `executor`, with their logs on the screen.

    A string `stage:NAME` in a recipe, or `stage:NAME/rest`, stands for the folder of an earlier stage's run. A stage
    that succeeded before, with the same recipe, is not run again, unless one before it is.

    Args:
        stages: name -> recipe, in order.
        executor: where.
        name: of the experiment, for `nemo experiment list`.
        detach: leave the jobs to Slurm and return; `nemo experiment status` and `logs` tell of them.

    Returns:
        The experiment's id, for `nemo experiment status ID`; of the last stage, where each has one of its own.

    Raises:
        ConfigError: something is refused; nothing was started.
        JobFailed: a stage failed; the message says where, how, and what it said last.
    """
    checks.not_in_a_job()
    stages = _wired(stages)
    checks.check_recipes(name, stages, executor)
    left = _left(stages)
    for stage in stages.keys() - left.keys():
        log(f"stage {stage} has succeeded before: {folder_of(stages[stage])}")
    if not left:
        return ""
    checks.check_executor(executor, detach=detach)
    if isinstance(executor, run.SlurmExecutor):
        sacct_shim.ensure_sacct(executor, detach=detach)
        return _run(name, left, executor, detach=detach)
    identity = ""
    for stage, recipe in left.items():
        title = f"{name}_{stage}" if len(stages) > 1 else name
        with terminate_children_on_signal() if isinstance(executor, run.LocalExecutor) else contextlib.nullcontext():
            identity = _run(title, {stage: recipe}, executor, detach=False)
    return identity


def dryrun(stages: Mapping[str, run.Partial], executor: run.Executor, *, name: str = "align") -> None:
    """Print what would be submitted, and refuse what would be refused; nothing is.

    Raises:
        ConfigError: see `launch`.
    """
    stages = _wired(stages)
    checks.check_recipes(name, stages, executor)
    with _experiment(name, stages, executor) as experiment:
        folder = Path(experiment._exp_dir)
        experiment.dryrun(log=not isinstance(executor, run.SlurmExecutor), delete_exp_dir=False)
        for script in sorted(folder.glob("*_sbatch.sh")):
            print(script.read_text())
        shipped = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "code" not in p.parts)
        code = sum(p.is_file() for p in folder.glob("*/code/**/*"))
        log(f"files of the job: {', '.join(shipped)}; and {code} of the code")
        shutil.rmtree(folder)
    checks.check_executor(executor, detach=False)


def _run(name: str, stages: Mapping[str, run.Partial], executor: run.Executor, *, detach: bool) -> str:
    with _experiment(name, stages, executor) as experiment, failures.of_submission():
        try:
            experiment.run(detach=detach)
        except BaseException:
            for job in experiment.jobs:  # those before the one that was refused
                job.cancel(experiment._runner)
            raise
    if detach:
        return experiment._id
    found = failures.wait_until_final(experiment, executor)
    for stage, recipe in stages.items():
        if failures.state(found[stage]) != "SUCCEEDED":
            raise failures.JobFailed(failures.report(stage, found, experiment, executor))
        with contextlib.suppress(OSError):  # another machine's folder
            _note(recipe).write_text(json.dumps({"recipe": _identity(recipe)}))
    return experiment._id


@contextlib.contextmanager
def _experiment(name: str, stages: Mapping[str, run.Partial], executor: run.Executor) -> Iterator[run.Experiment]:
    quiet = {"log_level": "WARNING", "enable_goodbye_message": False, "skip_status_at_exit": True}
    with run.Experiment(name, executor=executor, **quiet) as experiment:  # type: ignore[arg-type]
        before: list[str] = []
        for stage, recipe in stages.items():
            before = [experiment.add(recipe, name=stage, tail_logs=True, dependencies=before)]
        yield experiment


def _left(stages: Mapping[str, run.Partial]) -> dict[str, run.Partial]:
    """Stages from the first one on that has not succeeded with this very recipe."""
    names = list(stages)
    for i, name in enumerate(names):
        try:
            done = json.loads(_note(stages[name]).read_text())["recipe"] if folder_of(stages[name]).exists() else None
        except (OSError, ValueError, KeyError):
            done = None
        if done != _identity(stages[name]):
            return {name: stages[name] for name in names[i:]}
    return {}


def _identity(recipe: run.Partial) -> str:
    return hashlib.sha256(ZlibJSONSerializer().serialize(recipe).encode()).hexdigest()[:16]


def _note(recipe: run.Partial) -> Path:
    """The file that says which recipe made a stage's folder, or its file."""
    made = folder_of(recipe)
    return made / SUCCEEDED if made.is_dir() else made.with_name(f"{made.name}.{SUCCEEDED}")


def folder_of(recipe: run.Partial) -> Path:
    """What a stage makes: the folder of its run, or what its `output` names."""
    log: Any = getattr(recipe, "log", None)
    if log is not None:
        return Path(log.log_dir or "nemo_experiments").expanduser() / log.name
    return Path(str(getattr(recipe, "output", None) or "nowhere"))


def _wired(stages: Mapping[str, run.Partial]) -> dict[str, run.Partial]:
    """The recipes with `stage:NAME` replaced by the folder of that stage, which must be an earlier one."""
    found: dict[str, run.Partial] = {}

    def path(text: str) -> str:
        if not text.startswith("stage:"):
            return text
        name, slash, rest = text.removeprefix("stage:").partition("/")
        checks.known_stage(text, name, list(found))
        return f"{folder_of(found[name])}{slash}{rest}"

    for stage, recipe in stages.items():
        found[stage] = checks.mapped(copy.deepcopy(recipe), path)
    return found
