"""Checkpoints: when they are made, which are kept, what is wrong with them, what a run says when it goes on."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest
from hand import Disturb, Intrude
from launching import forked

from aligner import losses
from aligner.callbacks import checkpointing
from aligner.checkpoint import folders
from aligner.checkpoint.kept import KeptCheckpoints, steps_to_keep
from aligner.checkpoint.safety.ledger import Ledger
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.run_folder import read_metrics
from aligner.model.reference import FrozenReference
from aligner.train import resume_settings, run_lock

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- when, and which are kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "top_k", "mode", "monitored", "stay"),
    [
        ([(1, None), (2, None), (3, None)], 1, "min", False, {3}),
        ([(1, None), (2, None), (3, None)], 2, "min", False, {2, 3}),
        ([(1, None), (2, None), (3, None)], -1, "min", False, {1, 2, 3}),
        ([(1, 0.3), (2, 0.1), (3, 0.2)], 1, "min", True, {2, 3}),
        ([(1, 0.3), (2, 0.1), (3, 0.2)], 1, "max", True, {1, 3}),
        ([(1, 0.1), (2, 0.1), (3, 0.2)], 1, "min", True, {2, 3}),  # of two alike the later one
        ([(1, None), (2, 0.5), (3, None)], 2, "min", True, {2, 3}),
        ([(1, 0.1), (2, 0.5)], 0, "min", True, {2}),
    ],
)
def test_the_newest_and_the_best_stay(
    found: list[tuple[int, float | None]], top_k: int, mode: str, monitored: bool, stay: set[int]
) -> None:
    assert steps_to_keep(found, top_k, mode, monitored) == stay


def test_the_best_by_validation_are_kept_with_the_newest_and_a_link(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.trainer.max_steps, recipe.trainer.val_check_interval = 8, 2
    recipe.log.ckpt.monitor, recipe.log.ckpt.mode = "val/loss", "max"
    recipe.log.ckpt.save_last = True
    folder = execute(recipe)
    values = {int(row["step"]): row["val/loss"] for row in read_metrics(folder / "metrics.csv") if "val/loss" in row}
    best = max((step for step in values if step), key=lambda step: values[step])
    assert best != 8 and names(folder) == sorted({"last", f"step={best}", "step=8"})
    assert (folder / "checkpoints/last").resolve().name == "step=8"
    said = folders.metadata(folder / f"checkpoints/step={best}")
    assert said["value"] == pytest.approx(values[best]) and said["monitor"] == "val/loss"
    # Another job knows which is the best, wherever the run lies now.
    moved = folder.rename(folder.with_name("moved"))
    recipe.log.name, recipe.trainer.max_steps = "moved", 10
    execute(recipe)
    assert f"step={best}" in names(moved) and "step=10" in names(moved)


def test_a_checkpoint_says_what_it_is(tiny: Tiny, execute: Execute) -> None:
    folder = execute(tiny())
    said = folders.metadata(folder / "checkpoints/step=4")
    assert (said["step"], said["consumed_samples"], said["epoch"]) == (4, 16, 1)
    assert said["settings"]["loss"] == "dpo" and said["settings"]["loss.beta"] == 0.1
    assert said["settings"]["reference"] == "CachedReference" and said["settings"]["optim.config.lr"] == 1e-3
    assert said["layout"] == {"ranks": 1, "tensor": 1, "pipeline": 1, "context": 1, "expert": 1}
    assert set(said["versions"]) >= {"nemo-align", "megatron-core", "torch"}


@pytest.mark.parametrize(
    ("validate", "save", "validated", "saved"),
    [(3, 2, [0, 3, 6, 7], [2, 4, 6, 7]), (2, 5, [0, 2, 4, 6, 7], [5, 7]), (0.3, 3, [0, 2, 4, 6, 7], [3, 6, 7])],
)
def test_saving_and_validating_need_not_fall_together(
    tiny: Tiny, execute: Execute, validate: Any, save: int, validated: list[int], saved: list[int]
) -> None:
    """NeMo-Aligner dies where one interval does not divide the other; here also without max_steps."""
    recipe = tiny(rows=28, held_out=2)
    recipe.trainer.max_steps, recipe.trainer.max_epochs = -1, 1
    recipe.optim.lr_scheduler.max_steps = -1
    recipe.trainer.val_check_interval, recipe.log.ckpt.every_n_train_steps = validate, save
    recipe.log.ckpt.save_top_k = -1
    folder = execute(recipe)
    assert [row["step"] for row in read_metrics(folder / "metrics.csv") if "val/loss" in row] == validated
    assert names(folder) == [f"step={step}" for step in saved]


def test_the_newest_two_stay(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny(held_out=0)
    recipe.log.ckpt.every_n_train_steps, recipe.log.ckpt.save_top_k = 1, 2
    assert names(execute(recipe)) == ["step=3", "step=4"]


def test_any_metric_of_validation_can_be_monitored_that_there_is(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.log.ckpt.monitor, recipe.log.ckpt.mode, recipe.log.ckpt.save_top_k = "val/rewards_margin_mean", "max", 1
    folder = execute(recipe)
    values = {r["step"]: r["val/rewards_margin_mean"] for r in read_metrics(folder / "metrics.csv") if "val/loss" in r}
    assert folders.metadata(folder / "checkpoints/step=4")["value"] == pytest.approx(values[4])
    recipe = tiny("kl")
    recipe.log.ckpt.monitor = "val/kl"
    with pytest.raises(ConfigError, match=r"log.ckpt.monitor: val/kl is not measured with this loss"):
        execute(recipe)


def test_minutes_save_too(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny(held_out=0)
    recipe.log.ckpt.every_n_train_steps, recipe.log.ckpt.every_n_minutes = None, 1e-6
    recipe.log.ckpt.save_top_k = -1
    assert names(execute(recipe)) == [f"step={step}" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every_n_train_steps": 0}, r"log.ckpt.every_n_train_steps: must be more than 0"),
        ({"every_n_minutes": -1.0}, "log.ckpt.every_n_minutes: must be more than 0"),
        ({"save_top_k": -2}, "log.ckpt.save_top_k: is -2"),
        ({"monitor": "val_loss"}, r"log.ckpt.monitor: 'val_loss' is not one of val/loss, "),
        ({"monitor": "val/easy/lr"}, r"'val/easy/lr' is not one of val/loss, .* with the name of a validation set"),
        ({"monitor": "val/easy/loss"}, r"of validation sets there is one without a name, which val/loss measures"),
        ({"monitor": "val/loss", "every_n_train_steps": 3}, r"3 is no multiple of trainer.val_check_interval \(2\)"),
        ({"monitor": "val/loss", "every_n_minutes": 5.0}, "every_n_minutes: 5.0 is no multiple of validations"),
    ],
)
def test_savings_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpointing.CheckpointCallback(**given).check(val_check_interval=2, validates=True)
    with pytest.raises(ConfigError, match=r"there is no data.validation"):
        checkpointing.CheckpointCallback(monitor="val/loss").check(val_check_interval=2, validates=False)


def test_saving_beside_the_training_is_whole_and_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """NeMo's asynchronous saving, one and two ranks; killed while training goes on; then gone on with."""

    def job(name: str, ranks: int, *callbacks: Any) -> tuple[int, Any]:
        recipe = tiny(name, num_gpus_per_node=ranks)
        recipe.trainer.max_steps, recipe.trainer.strategy.ckpt_async_save = 9, True
        recipe.trainer.callbacks = list(callbacks)
        return ranks, recipe

    kill = run.Config(Disturb, at=7, signals=(9,))
    codes, said = forked(tmp_path, [job("one", 1, kill), job("two", 2), job("one", 1)])
    assert codes == [[-9], [0, 0], [0]], said[-4000:]
    for name in ("one", "two"):
        assert names(tmp_path / "runs" / name) == ["step=9"]
        assert folders.find_corruption(tmp_path / f"runs/{name}/checkpoints/step=9") is None
        steps = [row["step"] for row in read_metrics(tmp_path / f"runs/{name}/metrics.csv") if "train/loss" in row]
        assert steps == list(range(9))
    assert "resuming from step 6" in said or "resuming from step 4" in said


# ---- what may be wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def three(tiny: Tiny, execute: Execute) -> Path:
    """A run with checkpoints after 2, 4 and 6 steps."""
    recipe = tiny()
    recipe.trainer.max_steps, recipe.log.ckpt.save_top_k = 6, -1
    return execute(recipe)


def shard(checkpoint: Path) -> Path:
    return max((checkpoint / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_is_passed_over_and_named(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = three / "checkpoints"
    whole = shard(folder / "step=6").read_bytes()
    shard(folder / "step=6").write_bytes(whole[:-100])
    assert folders.latest_checkpoint(three) == folder / "step=4"
    assert f"has {len(whole) - 100} bytes, and " in capsys.readouterr().err
    shard(folder / "step=4").unlink()
    (folder / "step=2/weights/.metadata").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* is whole") as found:
        folders.latest_checkpoint(three)
    for part in ("distcp has ", "distcp is missing", "step=2: weights/.metadata has 12 bytes, and "):
        assert part in str(found.value)
    assert len(list(folder.iterdir())) == 3, "nothing is removed"


def test_a_damaged_checkpoint_makes_room_for_a_new_one_of_its_step(three: Path, tiny: Tiny, execute: Execute) -> None:
    shard(three / "checkpoints/step=6").unlink()
    recipe = tiny()
    recipe.trainer.max_steps = 6
    execute(recipe)
    assert folders.find_corruption(three / "checkpoints/step=6") is None
    assert names(three) == ["step=6"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (99, r"written by nemo-align 7.0 in format 99, and this version reads up to"),
        (
            1,
            r"step=6: was written in format 1, before the classes that it names moved.*resume it with the version that",
        ),
    ],
)
def test_a_checkpoint_of_another_format_is_named(
    three: Path, tiny: Tiny, execute: Execute, written: int, message: str
) -> None:
    """And not passed over for an older one: a run that went on from that would end in its place."""
    path = three / "checkpoints/step=6/align.json"
    said = json.loads(path.read_text()) | {"format": written}
    said["versions"]["nemo-align"] = "7.0"
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=message):
        execute(tiny())


def test_what_was_being_written_is_passed_over_and_cleared_away(three: Path, tiny: Tiny, execute: Execute) -> None:
    shutil.copytree(three / "checkpoints/step=6", three / "checkpoints/step=8.partial")
    shutil.copytree(three / "checkpoints/step=6", three / "checkpoints/somebody's.partial")
    Ledger(three).record("step=8.partial", "partial")
    assert folders.latest_checkpoint(three) == three / "checkpoints/step=6"
    recipe = tiny()
    recipe.trainer.max_steps = 7
    execute(recipe)
    assert names(three) == ["somebody's.partial", "step=7"]


def test_nothing_whole_goes_for_the_sake_of_what_is_damaged(three: Path, tiny: Tiny, execute: Execute) -> None:
    """A damaged checkpoint that bears more steps is not the newest one; and it stays."""
    shard(three / "checkpoints/step=6").unlink()
    recipe = tiny()
    recipe.trainer.max_steps = 5
    execute(recipe)
    assert names(three) == ["step=5", "step=6"]
    assert folders.latest_checkpoint(three) == three / "checkpoints/step=5"


def test_a_run_does_not_begin_anew_over_another(three: Path, tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.resume.resume_if_exists = False
    with pytest.raises(CheckpointError, match=r"resume.resume_if_exists: False, but .*runs/run has checkpoints"):
        execute(recipe)
    assert names(three) == ["step=2", "step=4", "step=6"]


def test_a_value_of_an_earlier_step_is_not_a_checkpoints_own(tiny: Tiny, tmp_path: Path) -> None:
    """Saved where a signal came, between two validations."""
    recipe = tiny()
    recipe.trainer.max_steps, recipe.trainer.val_check_interval = 8, 2
    recipe.log.ckpt.monitor, recipe.log.ckpt.save_top_k = "val/loss", 1
    recipe.trainer.callbacks = [run.Config(Disturb, at=2, signals=(15,))]
    codes, said = forked(tmp_path, [(1, recipe)])
    assert codes == [[75]], said[-3000:]
    folder = tmp_path / "runs/run"
    assert names(folder) == ["step=2", "step=3"]
    values = [folders.metadata(folder / f"checkpoints/step={step}")["value"] for step in (2, 3)]
    assert values[0] > 0 and values[1] is None


def test_a_disk_without_room_is_found_before_anything_is_written(
    three: Path, tiny: Tiny, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*.distcp")}
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    recipe = tiny()
    recipe.trainer.max_steps = 8
    with pytest.raises(CheckpointError, match=r"is full: 0.00 GB are left, and a checkpoint takes about .* GB"):
        execute(recipe)
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*.distcp")} == before


def test_two_jobs_do_not_share_a_run(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    with (
        run_lock.lock_run(tmp_path / "runs/run"),
        pytest.raises(CheckpointError, match=r"another job is at work in .*runs/run \(process \d+ on "),
    ):
        execute(tiny())
    # NeMo moves the files that it finds in a run's folder away; not the lock.
    recipe = tiny()
    recipe.trainer.callbacks = [run.Config(Intrude)]
    execute(recipe)
    assert Intrude.refused == ["another job is at work"] * 4


# ---- what may change -----------------------------------------------------------------------------------------------


def test_what_a_run_means_does_not_change_unless_it_is_allowed(
    tiny: Tiny, execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tiny()
    begun.optim.lr_scheduler.warmup_steps = 10
    execute(begun)

    def again(**changes: Any) -> Any:
        recipe = tiny()
        recipe.trainer.max_steps, recipe.optim.lr_scheduler.warmup_steps = 5, 10
        recipe.loss = changes.get("loss", recipe.loss)
        recipe.optim.config.lr = changes.get("lr", recipe.optim.config.lr)
        recipe.resume.allow_changes = changes.get("allow", [])
        return recipe

    beta = run.Partial(losses.dpo, beta=0.3)
    with pytest.raises(ConfigError, match=r"^loss.beta: was 0.1, is 0.3\. .*resume.allow_changes=loss\.beta$"):
        execute(again(loss=beta))
    with pytest.raises(ConfigError, match=r"^loss: was 'dpo', is 'ipo'; loss.average_log_probs: was False, is True; "):
        execute(again(loss=run.Partial(losses.ipo)))
    with pytest.raises(ConfigError, match=r"optim.config.lr: was 0.001, is 0.0005"):
        execute(again(lr=5e-4, loss=beta, allow=["loss"]))
    with pytest.raises(ConfigError, match=r"resume.allow_changes: 'loss.gamma' is no setting of this run; there are: "):
        execute(again(allow=["loss.gamma"]))
    folder = execute(again(lr=5e-4, loss=beta, allow=["loss.beta", "optim.config.lr"]))
    assert "loss.beta: was 0.1, is 0.3 from here on, as resume.allow_changes says" in capsys.readouterr().err
    rates = [row["train/lr"] for row in read_metrics(folder / "metrics.csv") if "train/lr" in row]
    assert rates[4] == pytest.approx(5e-4 * 5 / 11) and rates[3] == pytest.approx(1e-3 * 4 / 11), "it takes effect"
    assert folders.metadata(folder / "checkpoints/step=5")["settings"]["loss.beta"] == 0.3


def test_what_checkpoints_hold_cannot_be_allowed_to_change() -> None:
    then = {"reference": "CachedReference", "loss.beta": 0.1}
    with pytest.raises(ConfigError, match=r"reference: was 'CachedReference', is 'Sync.*another log.name$"):
        resume_settings.compare(then, then | {"reference": "SyncedReference"}, allowed=["reference"])


def test_where_the_reference_is_kept_may_change(tiny: Tiny, execute: Execute) -> None:
    """The numbers are the same, whether the copy is in the model's memory or in the host's."""

    def job(steps: int, cpu_offload: bool) -> Any:
        recipe = tiny()
        recipe.trainer.max_steps = steps
        recipe.reference = run.Config(FrozenReference, cpu_offload=cpu_offload)
        return recipe

    execute(job(2, False))
    folder = execute(job(4, True))
    assert [row["step"] for row in read_metrics(folder / "metrics.csv") if "train/loss" in row] == [0, 1, 2, 3]


def test_a_longer_run_follows_the_longer_schedule(tiny: Tiny, execute: Execute) -> None:
    def job(name: str, steps: int) -> Any:
        recipe = tiny(name)
        recipe.trainer.max_steps, recipe.optim.lr_scheduler.warmup_steps = steps, 2
        recipe.log.ckpt.every_n_train_steps = 50
        return recipe

    def rates(folder: Path) -> list[float]:
        return [row["train/lr"] for row in read_metrics(folder / "metrics.csv") if "train/lr" in row]

    short = rates(execute(job("longer", 4)))
    longer, straight = rates(execute(job("longer", 10))), rates(execute(job("straight", 10)))
    assert longer[:4] == short != straight[:4]
    assert longer[4:] == straight[4:], "the first step of the second job, too"


def test_one_checkpoint_of_another_kind_of_model_is_refused(tiny: Tiny, execute: Execute) -> None:
    from nemo.collections import llm

    execute(tiny())
    recipe = tiny()
    recipe.trainer.max_steps = 6
    recipe.model = run.Config(llm.MixtralModel, config=run.Config(llm.MixtralConfig), tokenizer=recipe.model.tokenizer)
    with pytest.raises(CheckpointError, match=r"the recipe builds a MixtralModel, but .* holds a LlamaModel"):
        execute(recipe)


def test_removing_does_not_hold_the_training_up(tmp_path: Path) -> None:
    """The name goes at once; what a kill leaves of the files has a name that is passed over."""
    old = tmp_path / "checkpoints/step=2"
    old.mkdir(parents=True)
    (old / "file").touch()
    KeptCheckpoints(tmp_path)._remove(old)
    assert not old.exists()
    deadline = time.monotonic() + 100
    while list(old.parent.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(old.parent.iterdir())
