"""One rank, in this process, on the real engine: NeMo's trainer over Megatron."""

import gzip
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch
from reading import tensors

from aligner import losses
from aligner.checkpoint import folders
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.run_folder import read_metrics
from aligner.data.module import AlignDataModule

Recipe = Any
Tiny = Callable[..., Recipe]
Execute = Callable[[Recipe], Path]


def assert_same(left: Path, right: Path) -> None:
    a, b = tensors(left), tensors(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_step_0_costs_ln_2_and_pays_nothing(tiny: Tiny, execute: Execute) -> None:
    rows = read_metrics(execute(tiny()) / "metrics.csv")
    validation, training = rows[0], rows[1]
    assert validation["step"] == training["step"] == 0
    for row, split in ((validation, "val"), (training, "train")):
        assert row[f"{split}/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row[f"{split}/acc"] == 0.5
        for name in (
            "rewards_chosen_mean",
            "rewards_rejected_mean",
            "rewards_margin_mean",
            "rewards_all_std",
        ):
            assert row[f"{split}/{name}"] == 0.0
        assert row[f"{split}/chosen_lengths"] < row[f"{split}/rejected_lengths"]


def test_what_is_logged_and_when(tiny: Tiny, execute: Execute) -> None:
    folder = execute(tiny())
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 2, 4]
    last = [row for row in rows if "train/loss" in row][-1]
    assert last["train/consumed_samples"] == 16
    assert last["train/grad_norm"] > 0
    assert last["train/tokens_per_second"] > 0
    assert last["train/lr"] > 0
    assert last["train/rewards_margin_mean"] != 0
    assert list((folder / "tensorboard").glob("events.*"))


def test_a_run_goes_on_where_it_was_to_the_bit(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    straight = execute(tiny("straight"))
    stopped = tiny("stopped")
    stopped.trainer.callbacks = [run.Config(StopAfter, steps=3)]
    with pytest.raises(SystemExit):  # what Lightning makes of it
        execute(stopped)
    assert folders.step_of(folders.latest_checkpoint(tmp_path / "runs/stopped")) == 2  # type: ignore[arg-type]
    execute(tiny("stopped"))
    for name in ("straight", "stopped"):
        assert folders.step_of(folders.latest_checkpoint(tmp_path / "runs" / name)) == 4  # type: ignore[arg-type]
    assert_same(folders.latest_checkpoint(straight), folders.latest_checkpoint(tmp_path / "runs/stopped"))  # type: ignore[arg-type]
    a, b = (read_metrics(tmp_path / "runs" / name / "metrics.csv") for name in ("straight", "stopped"))
    measured = ("step", "train/loss", "train/consumed_samples", "val/loss", "val/acc")
    assert [{k: row[k] for k in measured if k in row} for row in a] == [
        {k: row[k] for k in measured if k in row} for row in b
    ]


class StopAfter(pl.Callback):
    """A kill, as far as Python lets one make it: no hook after this one runs."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt


def test_a_finished_run_is_left_alone_and_can_be_extended(
    tiny: Tiny, execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = execute(tiny())
    before = folders.latest_checkpoint(folder)
    assert before is not None
    written = (before / "weights/.metadata").stat().st_mtime_ns
    execute(tiny())
    assert "has already made 4 of 4 steps" in capsys.readouterr().out
    assert (before / "weights/.metadata").stat().st_mtime_ns == written
    longer = tiny()
    longer.trainer.max_steps = 6
    execute(longer)
    assert folders.step_of(folders.latest_checkpoint(folder)) == 6  # type: ignore[arg-type]


def test_a_torn_checkpoint_is_passed_over(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.log.ckpt.save_top_k = -1
    folder = execute(recipe)
    last = folders.latest_checkpoint(folder)
    assert last is not None
    Path(f"{last}-unfinished").touch()
    older = folders.latest_checkpoint(folder)
    assert older is not None
    assert folders.step_of(older) == 2
    shutil.rmtree(older / "weights")
    with pytest.raises(CheckpointError, match=r"step=2: .*\.metadata is missing\. No checkpoint of .* is whole"):
        folders.latest_checkpoint(folder)


def test_epochs_say_when_to_stop_and_fractions_when_to_validate(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny(rows=18)
    recipe.trainer.max_steps = -1
    recipe.trainer.max_epochs = 2
    recipe.trainer.val_check_interval = 0.75
    # As recipes by the epoch have it: no length known beforehand, constant after the warm-up.
    recipe.optim.lr_scheduler.max_steps, recipe.optim.lr_scheduler.warmup_steps = -1, 2
    recipe.optim.lr_scheduler.min_lr = recipe.optim.config.lr
    rows = read_metrics(execute(recipe) / "metrics.csv")
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    assert 0 < rates[0] < rates[1] < rates[2]
    assert rates[2:] == [pytest.approx(1e-3)] * 6
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(8))
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 3, 6, 8]


def test_micro_batches_weigh_pairs_alike(tiny: Tiny, execute: Execute) -> None:
    losses = []
    for size in (1, 2, 4):
        recipe = tiny(f"micro{size}")
        recipe.data.micro_batch_size = size
        losses.append(
            [row["train/loss"] for row in read_metrics(execute(recipe) / "metrics.csv") if "train/loss" in row]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_the_configured_loss_is_the_one_that_trains(tiny: Tiny, execute: Execute) -> None:
    """A loss that is silently replaced by another is the commonest bug of the field."""
    curves = {}
    for beta in (0.1, 5.0):
        recipe = tiny(f"beta{beta}")
        recipe.loss = run.Partial(losses.dpo, beta=beta)
        curves[beta] = [r["train/loss"] for r in read_metrics(execute(recipe) / "metrics.csv") if "train/loss" in r]
    assert curves[0.1][0] == pytest.approx(curves[5.0][0])
    assert abs(curves[0.1][-1] - curves[5.0][-1]) > 1e-3


def test_sft_weight_adds_the_chosen_answers_mean_token_loss(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.sft_loss_weight = 0.5
    row = read_metrics(execute(recipe) / "metrics.csv")[1]
    assert row["train/sft_loss"] > 1
    assert row["train/loss"] == pytest.approx(row["train/preference_loss"] + 0.5 * row["train/sft_loss"], rel=1e-6)


def test_a_stage_starts_from_another(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    recipe = tiny("second")
    first = tiny("first")
    first.preference_loss_weight, first.sft_loss_weight, first.reference = 0.0, 1.0, None
    recipe.resume.init_stage = first
    second = read_metrics(execute(recipe) / "metrics.csv")
    measured = read_metrics(tmp_path / "runs/first/metrics.csv")
    assert "train/acc" not in measured[1]
    assert second[0]["val/logps_chosen_mean"] == pytest.approx(measured[-1]["val/logps_chosen_mean"], rel=1e-6)
    assert second[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)


# ---- order ---------------------------------------------------------------------------------------------------------


def test_every_row_is_seen_once_an_epoch_and_all_take_turns_in_sitting_out(tiny: Tiny, tmp_path: Path) -> None:
    import fiddle as fdl

    from aligner.demo import toy

    data: AlignDataModule = fdl.build(tiny(rows=18).data)
    data.tokenize(toy.tokenizer(), kind="pairs", runs=tmp_path)
    places = [int(row) for step in range(4 * 50) for row in data.global_batch(step)]
    for epoch in range(50):
        assert len(set(places[epoch * 16 : epoch * 16 + 16])) == 16
    assert set(places) == set(range(18))
    assert places[:16] != places[16:32]


def test_a_blend_of_a_file_and_a_compressed_one_is_trained(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    """Rows that the first epoch leaves out have a reference for when they come; other weights are another run."""
    recipe = tiny("blend", rows=20)
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(Path(recipe.data.train).read_bytes().replace(b"+", b"-")))
    recipe.data.train = [3, recipe.data.train, 1, str(other)]
    recipe.trainer.max_steps = 14
    rows = read_metrics(execute(recipe) / "metrics.csv")
    assert len([row for row in rows if "train/loss" in row]) == 14
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    recipe.data.train[2], recipe.trainer.max_steps = 2, 16
    with pytest.raises(ConfigError, match=r"data.train.weights: was \[3\.0, 1\.0\], is \[3\.0, 2\.0\]"):
        execute(recipe)


def test_batches_that_workers_make_are_the_same(tiny: Tiny, execute: Execute) -> None:
    losses = []
    for workers in (0, 2):
        recipe = tiny(f"workers{workers}")
        recipe.data.num_workers, recipe.data.batching = workers, "packed"
        rows = read_metrics(execute(recipe) / "metrics.csv")
        losses.append([row.get("train/loss", row.get("val/loss")) for row in rows])
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_validation_weighs_every_row_once(tiny: Tiny, execute: Execute) -> None:
    """Six rows in global batches of four: two fillers, which must not count."""
    recipe = tiny("four", held_out=6)
    whole = tiny("six", held_out=6)
    whole.data.global_batch_size = 6
    whole.data.micro_batch_size = 6
    four, six = (read_metrics(execute(r) / "metrics.csv")[0] for r in (recipe, whole))
    for name in ("val/logps_chosen_mean", "val/rejected_lengths", "val/loss", "val/sft_loss"):
        assert four[name] == pytest.approx(six[name], rel=1e-6)


def test_a_full_disk_is_named_and_the_run_goes_on_with_room(
    tiny: Tiny, execute: Execute, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A file system of its own, so small that the second checkpoint does not fit."""
    import subprocess

    disk = tmp_path / "runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(disk)]))
    recipe = tiny(held_out=0)
    recipe.log.ckpt.save_top_k = -1
    with pytest.raises(CheckpointError, match=r"log.log_dir: the disk of .* is full"):
        execute(recipe)
    assert folders.step_of(folders.latest_checkpoint(disk / "run")) == 2  # type: ignore[arg-type]
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    execute(tiny(held_out=0))
    assert folders.step_of(folders.latest_checkpoint(disk / "run")) == 4  # type: ignore[arg-type]


# ---- what is said --------------------------------------------------------------------------------------------------


def test_rewards_that_no_row_has_are_said_to_be_label_smoothing(
    tiny: Tiny, execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("rpo", held_out=0)
    recipe.loss = run.Partial(losses.rpo_bwd_kl, reward_scale=1.0)
    recipe.trainer.max_steps = 1
    execute(recipe)
    said = capsys.readouterr().err
    assert "train: no row has chosen_reward and rejected_reward, so every pair gets 1 and 0" in said
    assert "label smoothing with the target 0.731" in said
    recipe = tiny("dpo", held_out=0)
    recipe.trainer.max_steps = 1
    execute(recipe)
    assert "no row has" not in capsys.readouterr().err


def test_a_reference_that_no_one_reads_is_not_prepared(
    tiny: Tiny, execute: Execute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("simpo", held_out=0)
    recipe.loss = run.Partial(losses.simpo)
    recipe.trainer.max_steps = 1
    execute(recipe)
    assert "reference: not prepared, the loss reads none" in capsys.readouterr().err
    assert not (tmp_path / "runs/reference").exists()
    recipe = tiny("none", held_out=0)
    recipe.reference = None
    with pytest.raises(ConfigError, match="reference: is None, but the loss holds the policy to a reference"):
        execute(recipe)
    recipe.loss = run.Partial(losses.orpo)
    recipe.trainer.max_steps = 1
    execute(recipe)
