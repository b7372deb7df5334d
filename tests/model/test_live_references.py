"""References that score each batch when its turn comes: they agree with the cache, survive a resume, and follow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch
from reading import tensors
from torch import Tensor

from aligner import losses
from aligner.checkpoint import folders
from aligner.common.errors import ConfigError
from aligner.common.run_folder import read_metrics
from aligner.losses import unpaired
from aligner.model.reference import BaseModelReference, CachedReference, FrozenReference, SyncedReference

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]
MEASURED = ("loss", "rewards_chosen_mean", "rewards_rejected_mean", "acc", "kl")


class Weights(pl.Callback):
    """The policy's weights before each step and at the end."""

    seen: list[dict[str, Tensor]]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        Weights.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})


def numbers(folder: Path) -> list[tuple[float, ...]]:
    """What was measured, bit by bit, of steps and validations."""
    rows = read_metrics(folder / "metrics.csv")
    return [tuple(v for k, v in row.items() if k.split("/")[-1] in MEASURED) for row in rows]


@pytest.fixture
def moving_fast(tiny: Tiny) -> Callable[..., Any]:
    """Runs in which policy and reference part quickly."""

    def make(name: str, reference: Any, **options: Any) -> Any:
        recipe = tiny(name, **options)
        recipe.model.config.init_method_std = 0.15
        recipe.optim.config.lr = 1e-2
        recipe.optim.lr_scheduler.warmup_steps = 0
        recipe.reference = reference
        return recipe

    return make


@pytest.mark.parametrize("loss", [losses.dpo, unpaired.kto])
def test_a_frozen_copy_agrees_with_the_cache_to_the_last_bit(
    moving_fast: Tiny, execute: Execute, tmp_path: Path, loss: Any
) -> None:
    found = {}
    for name, reference in {
        "cached": run.Config(CachedReference),
        "device": run.Config(FrozenReference),
        "host": run.Config(FrozenReference, cpu_offload=True),
    }.items():
        recipe = moving_fast(name, reference)
        recipe.loss = run.Partial(loss)
        found[name] = numbers(execute(recipe))
        assert (tmp_path / "runs/reference").exists()
    assert found["device"] == found["host"] == found["cached"]
    assert len({row[0] for row in found["cached"]}) > 4


def test_a_live_reference_writes_no_cache_and_takes_no_draw_from_the_data(
    moving_fast: Tiny, execute: Execute, tmp_path: Path
) -> None:
    """trl#7083: building the cache advanced a generator and changed the order of the rows."""
    lengths = []
    for reference in (None, run.Config(FrozenReference)):
        recipe = moving_fast(f"with_{reference is None}", reference)
        recipe.preference_loss_weight = 0.0 if reference is None else 1.0
        recipe.sft_loss_weight = 1.0
        rows = read_metrics(execute(recipe) / "metrics.csv")
        lengths.append([row["train/chosen_lengths"] for row in rows if "train/loss" in row])
    assert lengths[0] == lengths[1]
    assert not (tmp_path / "runs/reference").exists()


def test_dropout_is_off_in_the_reference(moving_fast: Tiny, execute: Execute) -> None:
    """trl#744, LLaMA-Factory#10779: a reference that drops out is another one each time."""
    found = {}
    for name, reference in {"cached": run.Config(CachedReference), "frozen": run.Config(FrozenReference)}.items():
        recipe = moving_fast(name, reference)
        recipe.model.config.hidden_dropout = recipe.model.config.attention_dropout = 0.5
        found[name] = numbers(execute(recipe))
    assert found["cached"] == found["frozen"]


@pytest.mark.parametrize(
    "reference",
    [run.Config(FrozenReference), run.Config(SyncedReference, mixup_alpha=0.25, sync_steps=1)],
    ids=["frozen", "synced"],
)
def test_a_copy_is_part_of_the_checkpoint(moving_fast: Tiny, execute: Execute, reference: Any) -> None:
    straight = numbers(execute(moving_fast("straight", reference)))
    first = moving_fast("stopped", reference)
    first.trainer.max_steps = 2
    first.optim.lr_scheduler.min_lr = 1e-2
    execute(first)
    again = moving_fast("stopped", reference)
    again.optim.lr_scheduler.min_lr = 1e-2
    stopped = numbers(execute(again))
    whole = moving_fast("whole", reference)
    whole.optim.lr_scheduler.min_lr = 1e-2
    assert stopped == numbers(execute(whole))
    assert len(straight) == len(stopped)


def test_a_moving_reference_follows_as_it_should(moving_fast: Tiny, execute: Execute) -> None:
    """π_ref ← ½ π + ½ π_ref every second step, against the weights that the policy had."""
    Weights.seen = []
    recipe = moving_fast("synced", run.Config(SyncedReference, mixup_alpha=0.5, sync_steps=2), held_out=0)
    recipe.trainer.callbacks = [run.Config(Weights)]
    folder = execute(recipe)
    newest = folders.latest_checkpoint(folder)
    assert newest is not None
    saved = tensors(newest)
    held = {n.removeprefix("reference."): t for n, t in saved.items() if n.startswith("reference.")}
    policy = {n: t for n, t in saved.items() if not n.startswith(("reference.", "optimizer."))}
    # Steps 0 to 3; the copy followed after steps 2 and 4, and the policy after step 4 is the one that was saved.
    start, after_two = Weights.seen[0], Weights.seen[2]
    name = next(n for n in start if "embedding" in n)
    theirs = next(n for n in policy if "embedding" in n)
    expected = 0.5 * policy[theirs] + 0.5 * (0.5 * after_two[name] + 0.5 * start[name])
    torch.testing.assert_close(held[theirs], expected)
    assert not torch.allclose(held[theirs], policy[theirs])
    assert set(held) == set(policy)


def test_a_copy_every_step_is_the_policy_of_the_step_before(moving_fast: Tiny, execute: Execute) -> None:
    recipe = moving_fast("copied", run.Config(SyncedReference, mixup_alpha=1.0, sync_steps=1), held_out=0)
    rows = read_metrics(execute(recipe) / "metrics.csv")
    assert [row["train/rewards_chosen_mean"] for row in rows] == [0.0] * 4
    assert [row["train/acc"] for row in rows] == [0.5] * 4


def test_what_a_reference_cannot_be_is_refused(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    for reference, message in (
        (run.Config(SyncedReference, mixup_alpha=0.0), "reference.mixup_alpha: must be above 0 and at most 1"),
        (run.Config(SyncedReference, sync_steps=0), "reference.sync_steps: must be at least 1 step"),
    ):
        recipe = tiny("odd")
        recipe.reference = reference
        with pytest.raises(Exception, match=message):
            execute(recipe)
    recipe = tiny("none")
    recipe.reference = run.Config(BaseModelReference)
    with pytest.raises(ConfigError, match="BaseModelReference, but peft is None"):
        execute(recipe)
    execute(tiny("began", held_out=0))
    recipe = tiny("began", held_out=0)
    recipe.trainer.max_steps = 6
    recipe.reference = run.Config(FrozenReference)
    with pytest.raises(ConfigError, match=r"reference: was 'CachedReference', is 'FrozenReference'"):
        execute(recipe)
    recipe.reference, recipe.loss = None, run.Partial(losses.simpo)
    with pytest.raises(ConfigError, match=r"reference: was 'CachedReference', is None"):
        execute(recipe)
