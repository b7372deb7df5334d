"""Every pair weighs the same, however a global batch is cut: peers.md section 3, row 2.

All losses are ln 2 at the start, whatever the weights, so gradients are compared: where a project takes the mean of
each micro-batch, cutting four pairs into 1 and 3 turns them (ms-swift#10144).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch
from hand import SaveGradients, differ
from launching import forked
from torch import Tensor

from aligner import losses
from aligner.data import module as data_module
from aligner.data.batch import Item, collate
from aligner.losses import unpaired

Tiny = Callable[..., Any]

ROWS = [
    ("1+1=", "2", "three and some more words"),
    ("22+33=", "it is fifty five of course", "?"),
    ("too long to be used " * 3, "a", "b"),
    ("a", "b", "c"),
    ("9+9=", "18", "99"),
]
LOSSES = {
    "dpo": run.Partial(losses.dpo, beta=0.5),
    "ipo": run.Partial(losses.ipo),
    "kto": run.Partial(unpaired.kto, beta=0.5),
}


@pytest.fixture
def gradient(tiny: Tiny, tmp_path: Path) -> Callable[..., Any]:
    """A recipe of one step on the four pairs that are short enough, which writes its gradient to a file."""
    keys = ("prompt", "chosen_response", "rejected_response")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in ROWS))

    def make(name: str, loss: str, micro_batch_size: int, ranks: int = 1) -> Any:
        recipe = tiny(name, held_out=0, num_gpus_per_node=ranks)
        recipe.loss = LOSSES[loss]
        recipe.data.train = str(tmp_path / "rows.jsonl")
        recipe.data.seq_length, recipe.data.max_dropped_fraction = 40, 0.5
        recipe.data.micro_batch_size = micro_batch_size
        recipe.trainer.max_steps = 1
        recipe.model.config.init_method_std = 0.15
        recipe.trainer.callbacks = [run.Config(SaveGradients, path=str(tmp_path / name))]
        return recipe

    return make


def cut_otherwise(monkeypatch: pytest.MonkeyPatch, *, copies: bool = False) -> None:
    """Hand out the four pairs of two micro-batches as one and three, with weightless copies beside them if asked."""
    waiting: list[Item] = []

    def cut(items: Sequence[Item], **options: Any) -> Any:
        if waiting:
            taken = [*waiting, *items]
            waiting.clear()
        else:
            taken = [items[0]]
            waiting.append(items[1])
        if copies:
            other = taken[0].mismatched
            taken.append(Item(taken[0].index, taken[0].example, valid=False, mismatched=other))
        return collate(taken, **options)

    monkeypatch.setattr(data_module, "collate", cut)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_and_accumulation_change_no_gradient(
    gradient: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    for name, size in (("4", 4), ("2+2", 2), ("1+1+1+1", 1)):
        fdl.build(gradient(name, loss, size))()
    # The reference is known by now; what is cut otherwise are the steps alone.
    cut_otherwise(monkeypatch)
    fdl.build(gradient("1+3", loss, 2))()
    cut_otherwise(monkeypatch, copies=True)
    fdl.build(gradient("copies", loss, 2))()
    for name in ("2+2", "1+1+1+1", "1+3", "copies"):
        assert differ(tmp_path / "4", tmp_path / name) < 1e-5, name


@pytest.mark.slow
def test_two_ranks_change_no_gradient(gradient: Callable[..., Any], tmp_path: Path) -> None:
    jobs = []
    for loss in LOSSES:
        recipe = gradient(f"{loss}_one", loss, 4)
        fdl.build(recipe)()
        jobs += [gradient(f"{loss}_2x2", loss, 2, ranks=2), gradient(f"{loss}_2x1x2", loss, 1, ranks=2)]
    codes, said = forked(tmp_path, [(2, job) for job in jobs])
    assert codes == [[0, 0]] * len(jobs), said[-4000:]
    for loss in LOSSES:
        for cut in ("2x2", "2x1x2"):
            assert differ(tmp_path / f"{loss}_one", tmp_path / f"{loss}_{cut}") < 1e-5, (loss, cut)


def test_the_mean_of_means_would_be_seen(gradient: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    """The test can fail: a loss that is averaged in each micro-batch has another gradient."""
    from aligner.model.policy import LossReduction

    fdl.build(gradient("4", "dpo", 4))()
    true = LossReduction.forward

    def averaged(self: Any, batch: Any, out: Tensor) -> Any:
        total, count, rest = true(self, batch, out)
        return total / count, torch.ones_like(count), rest

    monkeypatch.setattr(LossReduction, "forward", averaged)
    cut_otherwise(monkeypatch)
    fdl.build(gradient("1+3", "dpo", 2))()
    assert differ(tmp_path / "4", tmp_path / "1+3") > 0.05
