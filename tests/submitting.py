"""What tests of jobs on other executors share: where they are submitted from, slow jobs, what became of them."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from hand import Slow

from aligner.checkpoint import checkpoint_diff, folders
from aligner.common.run_folder import read_metrics

STEPS = 16
"""Of a slow job."""
Background = tuple[threading.Thread, list[BaseException]]


@contextlib.contextmanager
def submitting_from(folder: Path, environment: dict[str, str], nemorun: Path | None = None) -> Iterator[None]:
    """Work in a folder, with NeMo-Run's files there or in `nemorun`, whose name needs no quotes.

    NeMo-Run's commands look at standard input, which pytest forbids.
    """
    from nemo_run.config import set_nemorun_home

    with open(os.devnull) as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", nothing)
        for name, value in environment.items():
            patch.setenv(name, value)
        set_nemorun_home(str(nemorun or folder / "nemorun"))
        patch.chdir(folder)
        yield


def slow(tiny: Callable[..., Any], name: str, seconds: float, steps: int = STEPS) -> Any:
    """A recipe for two nodes that sleeps after each step."""
    recipe = tiny(name, num_nodes=2, held_out=0)
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = steps
    recipe.log.ckpt.every_n_train_steps = 3
    recipe.trainer.callbacks = [run.Config(Slow, seconds=seconds)]
    return recipe


def in_background(job: Callable[[], Any]) -> Background:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            job()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, failed


def status(title: str) -> dict[str, str]:
    """Return the state of each stage of the newest experiment of a title, as `nemo experiment status` has it."""
    found = run.Experiment.from_title(title).status(return_dict=True) or {}
    return {name: str(said["status"]).rsplit(".", 1)[-1] for name, said in found.items()}


def steps_of(folder: Path) -> list[int]:
    """Return the steps that a run has trained, by its metrics."""
    return [int(row["step"]) for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]


def same_weights(one: Path, other: Path) -> None:
    newest = [folders.latest_checkpoint(each) for each in (one, other)]
    assert newest[0] and newest[1]
    assert checkpoint_diff.first_difference(*(checkpoint_diff.read(path) for path in newest if path)) is None
