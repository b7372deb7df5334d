"""`nemo llm verify-resume` finds what a resume does not bring back, and says identical when nothing is missing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hand import Forgets
from launching import TIME_LIMIT

from aligner.checkpoint import checkpoint_diff
from aligner.cli.verify_resume import verify
from aligner.common.errors import ConfigError

Tiny = Callable[..., Any]
TESTS = str(Path(__file__).parent.parent)


def test_a_checkpoint_is_read_whole(tmp_path: Path) -> None:
    """Also what Megatron keeps as an object, Transformer Engine's states among it: a list that holds tensors."""
    for name in ("one", "other"):
        path = tmp_path / name / "weights"
        held = (torch.arange(3), torch.full((2,), float(name == "other")))
        dcp.save({"w": torch.ones(2), "extra": held}, checkpoint_id=path, no_dist=True)
        torch.save({"global_step": 3, "optimizer": {"param_groups": [{"lr": 0.1}]}}, path / "common.pt")
    one, other = (checkpoint_diff.read(tmp_path / name) for name in ("one", "other"))
    assert one["global_step"] == 3 and one["optimizer.param_groups[0].lr"] == 0.1
    assert checkpoint_diff.first_difference(one, one) is None
    assert str(checkpoint_diff.first_difference(one, other)).startswith("extra[1][0]: 0.0 and 1.0 (2 of 2 elements")


def test_the_first_difference_is_named() -> None:
    one = {"a": torch.zeros(2, 3), "b": 1, "c": torch.ones(1)}
    assert checkpoint_diff.first_difference(one, {**one, "a": torch.zeros(2, 3)}) is None
    other = torch.zeros(2, 3)
    other[1, 2] = 0.5
    found = checkpoint_diff.first_difference(one, {**one, "a": other})
    assert found == "a[1, 2]: 0.0 and 0.5 (1 of 6 elements, largest distance 0.5)"
    assert checkpoint_diff.first_difference(one, {**one, "b": 2}) == "b: 1 and 2"
    assert checkpoint_diff.first_difference(one, {"a": one["a"], "b": 1}) == "c is only in the first"
    assert (
        checkpoint_diff.first_difference(one, {**one, "c": torch.ones(2)})
        == "c: (1,) torch.float32 and (2,) torch.float32"
    )


@pytest.mark.slow
def test_what_is_not_brought_back_is_found(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", TESTS)
    recipe = tiny()
    recipe.trainer.callbacks = [run.Config(Forgets)]
    found = verify(recipe, steps=6)
    assert found is not None and found.startswith("step 4, rank 0: loss: ")
    with pytest.raises(ConfigError, match=r"verify-run is left of an earlier comparison"):
        verify(recipe, steps=6)


@pytest.mark.slow
def test_two_ranks_are_identical(tiny: Tiny) -> None:
    recipe = tiny(num_gpus_per_node=2)
    recipe.model.config.hidden_dropout = 0.1
    assert verify(recipe, steps=6) is None


@pytest.mark.slow
def test_the_command_says_identical(tmp_path: Path) -> None:
    nemo = str(Path(sys.executable).parent / "nemo")
    words = ["llm", "verify-resume", "--factory", "tiny_dpo", "steps=6", "-y"]
    done = subprocess.run([nemo, *words], cwd=tmp_path, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "identical"), done.stderr[-2000:]


def test_too_few_steps_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="steps: 3 are too few"):
        verify(tiny(), steps=3)
