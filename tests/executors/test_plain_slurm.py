"""Recipes with NeMo-Run's own SlurmExecutor, plugins and experiments, on a real Slurm with accounts.

As docs/executors.md, "Plain NeMo-Run", has it: none of our executors, no `launch`.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from cluster import HERE, slurm, wait
from launching import TIME_LIMIT
from nemo.lightning.run.plugins import PreemptionPlugin
from submitting import STEPS, Background, in_background, same_weights, slow, status, steps_of, submitting_from

from aligner.checkpoint import folders
from aligner.common.run_folder import job_files

Tiny = Callable[..., Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster with accounts, and the folder that jobs are submitted from."""
    folder = tmp_path_factory.mktemp("plain")
    with slurm(folder / "cluster", accounts=True) as environment, submitting_from(folder, environment):
        yield folder


def plain(**settings: Any) -> run.SlurmExecutor:
    """Return what a user of NeMo-Run writes, for two nodes of one process each."""
    tests = shlex.quote(str(Path(__file__).parent.parent))
    python = shlex.quote(str(Path(sys.executable).parent))
    retries = settings.pop("retries", 0)
    more = {"requeue": True, "overcommit": True} | settings.pop("more", {})
    given: dict[str, Any] = {"nodes": 2, "ntasks_per_node": 1, "gpus_per_node": 1, "time": "00:30:00"} | settings
    executor = run.SlurmExecutor(
        account="tests",
        partition="gpu",
        mem="3000",
        signal=given.pop("signal", "TERM@120"),
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=""),
        env_vars=HERE | {"PYTHONPATH": tests},
        setup_lines=f"export PATH={python}:$PATH",
        additional_parameters=more,
        **given,
    )
    executor.retries = retries
    return executor


@pytest.fixture(scope="module")
def undisturbed(home: Path, tiny_in: Callable[[Path], Tiny]) -> Path:
    folder = home / "undisturbed"
    folder.mkdir()
    run.run(slow(tiny_in(folder), "straight", 0.0), executor=plain(), name="straight")
    return folder / "runs/straight"


def jobs(folder: Path) -> list[str]:
    """Return how each job of a run ended, by its own record."""
    return [json.loads(file.read_text())["ended"]["status"] for file in job_files(folder)]


def with_preemption(recipe: Any, name: str, preempt_time: int = 60, **settings: Any) -> None:
    """Run with NeMo's own plugin, which adds NeMo's own callback."""
    plugins: list[Any] = [PreemptionPlugin(preempt_time=preempt_time)]
    run.run(recipe, executor=plain(**settings), plugins=plugins, name=name)


@pytest.fixture(scope="module")
def limited(home: Path, tiny_in: Callable[[Path], Tiny]) -> tuple[Path, Background]:
    """A run in jobs of two minutes, with NeMo's plugin; it goes on beside the other tests."""
    folder = home / "limited"
    folder.mkdir()
    recipe = slow(tiny_in(folder), "limited", 4.0)
    job = in_background(lambda: with_preemption(recipe, "limited", time="00:02:00", retries=20))
    return folder / "runs/limited", job


def test_a_first_run(undisturbed: Path) -> None:
    assert steps_of(undisturbed) == list(range(STEPS))
    assert status("straight") == {"straight": "SUCCEEDED"}
    assert jobs(undisturbed) == ["success"]


def test_a_second_submission_goes_on(limited: Any, undisturbed: Path, tiny: Tiny, tmp_path: Path) -> None:
    first = slow(tiny, "twice", 0.0)
    first.trainer.max_steps = 6
    run.run(first, executor=plain(), name="twice")
    assert steps_of(tmp_path / "runs/twice") == list(range(6))
    run.run(slow(tiny, "twice", 0.0), executor=plain(), name="twice")
    assert steps_of(tmp_path / "runs/twice") == list(range(STEPS))
    assert len(jobs(tmp_path / "runs/twice")) == 2
    same_weights(undisturbed, tmp_path / "runs/twice")


def test_a_job_that_is_preempted_has_saved_and_has_not_succeeded(undisturbed: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "runs/preempted"
    recipe = slow(tiny, "preempted", 1.0)
    recipe.log.ckpt.every_n_train_steps = 1000
    thread, failed = in_background(lambda: with_preemption(recipe, "preempted"))
    wait(lambda: len(steps_of(folder)) >= 3, "three steps")
    shown = subprocess.run(["squeue", "-h", "-o", "%i %j"], capture_output=True, text=True, check=True).stdout
    (job,) = [line.split()[0] for line in shown.splitlines() if "preempted" in line]
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    thread.join(timeout=TIME_LIMIT)
    assert not thread.is_alive() and not failed, failed
    assert status("preempted") == {"preempted": "FAILED"}
    done = steps_of(folder)
    assert folders.latest_checkpoint(folder) is not None and 3 <= len(done) < STEPS
    assert jobs(folder) == ["preempted"]
    again = slow(tiny, "preempted", 0.0)
    again.log.ckpt.every_n_train_steps = 1000
    with_preemption(again, "preempted")
    assert status("preempted") == {"preempted": "SUCCEEDED"}
    assert steps_of(folder) == list(range(STEPS)), "nothing was done twice"
    same_weights(undisturbed, folder)


def test_what_depends_on_a_failed_stage_never_begins(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    broken, later = tiny("broken", num_nodes=2), tiny("later", num_nodes=2)
    broken.data.train = str(tmp_path / "none.jsonl")
    later.resume.restore_config = run.Config(_restore(), path=str(tmp_path / "runs/broken"))
    with run.Experiment("chain") as experiment:
        more = {"kill_on_invalid_dep": "yes"}
        first = experiment.add(broken, executor=plain(more=more), name="broken")
        experiment.add(later, executor=plain(more=more), name="later", dependencies=[first])
        experiment.run(detach=True)
    wait(lambda: not {"RUNNING", "PENDING", "SUBMITTED"} & set(status("chain").values()), "both stages to end")
    assert status("chain")["broken"] == "FAILED" and status("chain")["later"] == "CANCELLED"
    assert not (tmp_path / "runs/later").exists()
    (log,) = (home / "nemorun/experiments/chain").glob("*/broken/log-*.out")
    assert f"{tmp_path / 'none.jsonl'}: no such file" in log.read_text()


def _restore() -> Any:
    from nemo.lightning import RestoreConfig

    return RestoreConfig


def test_a_relative_folder_is_refused_before_anything_is_written(home: Path, tiny: Tiny) -> None:
    recipe = tiny("lost", num_nodes=2)
    recipe.log.log_dir = "runs"
    run.run(recipe, executor=plain(), name="lost")
    assert status("lost") == {"lost": "FAILED"}
    (log,) = (home / "nemorun/experiments/lost").glob("*/lost/log-*.out")
    assert "ConfigError: log.log_dir" in log.read_text()
    assert not list((home / "nemorun").glob("**/metrics.csv"))


def test_a_time_limit_is_not_an_end(limited: Any, undisturbed: Path) -> None:
    folder, (thread, failed) = limited
    thread.join(timeout=TIME_LIMIT)
    assert not thread.is_alive() and not failed, failed
    ended = jobs(folder)
    assert set(ended[:-1]) == {"preempted"} and ended[-1] == "success"
    same_weights(undisturbed, folder)


def test_more_ranks_than_the_recipe_has_are_refused(home: Path, tiny: Tiny) -> None:
    run.run(tiny("narrow"), executor=plain(), name="narrow")
    assert status("narrow") == {"narrow": "FAILED"}
    (log,) = (home / "nemorun/experiments/narrow").glob("*/narrow/log-*.out")
    assert "trainer.num_nodes" in log.read_text()
