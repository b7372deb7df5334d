"""Several validation sets: measured together, and each by itself, as in a run that has it alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest
from making import write_rows

from aligner.checkpoint import folders
from aligner.cli import dryrun
from aligner.common.errors import ConfigError
from aligner.common.run_folder import read_metrics
from aligner.losses import unpaired
from aligner.train import config_checks

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


def validated(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_metrics(folder / "metrics.csv") if "val/loss" in row]


def test_each_set_has_the_metrics_that_it_has_alone(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    easy, hard = (str(write_rows(tmp_path / f"{name}.jsonl", n, seed=n)) for name, n in (("easy", 7), ("hard", 5)))
    recipe = tiny("both")
    recipe.data.validation = {"easy": easy, "hard": [hard]}
    recipe.log.ckpt.monitor = "val/hard/loss"
    both = validated(execute(recipe))
    for name, path in (("easy", easy), ("hard", hard)):
        alone = tiny(name)
        alone.data.validation = path
        for together, own in zip(both, validated(execute(alone)), strict=True):
            for metric in ("loss", "acc", "rewards_margin_mean", "logps_chosen_mean"):
                assert together[f"val/{name}/{metric}"] == pytest.approx(own[f"val/{metric}"], rel=1e-6, abs=1e-9)
    saved = {folders.step_of(path): folders.metadata(path) for path in (tmp_path / "runs/both/checkpoints").iterdir()}
    measured = {row["step"]: row["val/hard/loss"] for row in both}
    for step, metadata in saved.items():
        assert metadata["monitor"] == "val/hard/loss" and metadata["value"] == pytest.approx(measured[step])
    for row in both:
        assert row["val/loss"] == pytest.approx((7 * row["val/easy/loss"] + 5 * row["val/hard/loss"]) / 12)


def test_what_is_no_set_is_refused(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    for value, message in (({"a/b": "x"}, "'a/b' is no name of a set"), ({}, "is empty")):
        recipe.data.validation = value
        with pytest.raises(ConfigError, match=f"data.validation: {message}"):
            execute(recipe)
    recipe = tiny()
    recipe.data.train = {"a": recipe.data.train}
    with pytest.raises(ConfigError, match=r"data\.train: is several sets by name"):
        execute(recipe)


def test_a_warm_up_longer_than_the_run_is_told(tiny: Tiny, execute: Execute, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tiny()
    recipe.optim.lr_scheduler.warmup_steps = 10
    execute(recipe)
    assert "warmup_steps: 10 steps of warm-up, but the run has 4; its rate ends at 40%" in capfd.readouterr().err
    # A dry run counts the rows that one epoch needs.
    recipe = tiny()
    recipe.trainer.max_steps, recipe.trainer.max_epochs = -1, 2
    steps = 2 * (len(Path(recipe.data.train).read_text().splitlines()) // recipe.data.global_batch_size)
    for warmup in (steps - 1, steps, 10 * steps):
        recipe.optim.lr_scheduler.warmup_steps = warmup
        dryrun.check_recipe(recipe, None)
        told = f"{warmup} steps of warm-up, but the run has {steps}; its rate ends" in capfd.readouterr().out
        assert told == (warmup >= steps)


@pytest.mark.parametrize(
    ("asked", "recorded", "steps", "found"),
    [
        (None, None, 4, 0),
        (None, None, 40, 4),
        (None, None, 5000, 10),
        (7, None, 40, 7),
        (None, 3, 400, 3),
        (7, 3, 40, 7),
    ],
)
def test_a_warm_up_is_a_tenth_of_the_run_unless_it_is_asked_for(
    asked: int | None, recorded: int | None, steps: int, found: int
) -> None:
    scheduler = SimpleNamespace(warmup_steps=asked)
    arguments: Any = SimpleNamespace(optim=SimpleNamespace(lr_scheduler=scheduler))
    config_checks.set_warmup(arguments, steps, recorded)
    assert scheduler.warmup_steps == found


def test_rows_that_fill_no_batch_are_told_with_what_would_use_them(
    tiny: Tiny, execute: Execute, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(rows=10)
    recipe.data.global_batch_size, recipe.data.micro_batch_size = 6, 1
    told = "train: 4 of 10 examples do not fill a last global batch and sit out each epoch, by turns"
    remedy = "; data.global_batch_size=5 leaves out 0"
    dryrun.check_recipe(recipe, None)
    assert told + remedy in capfd.readouterr().out
    execute(recipe)
    assert told + remedy in capfd.readouterr().err
    # What a run would refuse is not advised; of pairs, KTO has two examples.
    recipe.data.micro_batch_size = 3
    dryrun.check_recipe(recipe, None)
    assert f"{told}; data.global_batch_size=3 leaves out 1\n" in capfd.readouterr().out
    recipe.data.micro_batch_size = 6
    dryrun.check_recipe(recipe, None)
    assert f"{told}\n" in capfd.readouterr().out
    recipe.loss = run.Partial(unpaired.kto)
    dryrun.check_recipe(recipe, None)
    assert "train: 2 of 20 examples do not fill a last global batch" in capfd.readouterr().out


def test_a_checkpoint_from_before_a_setting_has_its_default() -> None:
    from aligner.train import resume_settings

    now = {"loss.beta": 0.1, **resume_settings.ADDED}
    assert not resume_settings.compare({"loss.beta": 0.1}, now, allowed=[])
    with pytest.raises(ConfigError, match=r"data\.ranked_pairs: was 'best_worst', is 'all'"):
        resume_settings.compare({"loss.beta": 0.1}, now | {"data.ranked_pairs": "all"}, allowed=[])
