"""What a run keeps of where it comes from: enough to do it again, and nothing secret."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest

from aligner.checkpoint import checkpoint_diff, folders
from aligner.cli import diff_runs
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.common.errors import CheckpointError


def test_a_run_is_done_again_by_what_it_kept(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not-for-anyone")
    recipe = tiny("one")
    recipe.loss.beta = 0.3
    run.run(recipe, direct=True)
    folder = tmp_path / "runs/one"
    again = load_yaml(folder / "config.yaml")
    assert again.loss.beta == 0.3
    again.log.name = "other"
    fdl.build(again)()
    one, other = (folders.latest_checkpoint(tmp_path / "runs" / name) for name in ("one", "other"))
    assert (
        one
        and other
        and checkpoint_diff.first_difference(checkpoint_diff.read(one), checkpoint_diff.read(other)) is None
    )
    difference = diff_runs.diff(str(folder), str(tmp_path / "runs/other"))
    assert [line for line in difference.splitlines() if line[0] in "+-"][2:] == ["-  name: one", "+  name: other"]
    job = folder / "provenance/job-1"
    said = json.loads((job / "job.json").read_text())
    assert said["settings"]["loss.beta"] == 0.3 and "data.train" in said["settings"]
    assert any(line.startswith("torch==") for line in (job / "packages.txt").read_text().splitlines())
    assert not any("not-for-anyone" in path.read_text() for path in job.iterdir())


def test_every_job_of_a_run_is_kept(tiny: Callable[..., Any], tmp_path: Path) -> None:
    first = tiny()
    fdl.build(first)()
    longer = tiny()
    longer.trainer.max_steps = 6
    fdl.build(longer)()
    folder = tmp_path / "runs/run"
    steps = [load_yaml(folder / f"provenance/job-{n}/config.yaml").trainer.max_steps for n in (1, 2)]
    assert steps == [4, 6] and load_yaml(folder / "config.yaml").trainer.max_steps == 6
    with pytest.raises(CheckpointError, match=r"nowhere: has no config.yaml"):
        diff_runs.diff(str(folder), str(tmp_path / "nowhere"))
