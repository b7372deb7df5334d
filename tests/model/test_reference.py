import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from aligner.common.errors import CheckpointError
from aligner.model import reference, weights_hash

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which splits were scored by a model rather than read from disk."""
    splits: list[str] = []
    true = reference.score_split

    def spy(trainer: Any, data: Any, split: str) -> Any:
        splits.append(split)
        return true(trainer, data, split)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "score_split", spy)
    return splits


def caches(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs/reference").glob("*"), key=os.path.getmtime)


def test_a_later_run_on_the_same_weights_and_tokens_scores_nothing(
    tiny: Tiny, execute: Execute, tmp_path: Path, scored: list[str]
) -> None:
    execute(tiny("first"))
    assert scored == ["train", "validation"]
    recipe = tiny("second")
    recipe.loss.beta = 0.5
    execute(recipe)
    assert len(scored) == 2
    assert len(caches(tmp_path)) == 2
    assert safetensors.torch.load_file(caches(tmp_path)[0])["logps"].shape == (16, 2)


@pytest.mark.parametrize("change", ["weights", "rows", "function"])
def test_other_weights_or_other_tokens_are_scored_anew(
    tiny: Tiny, execute: Execute, scored: list[str], change: str
) -> None:
    execute(tiny("first", held_out=0))
    second = tiny("second", held_out=0, rows=20 if change == "rows" else 16)
    if change == "weights":
        second.model.config.init_method_std = 0.03
    if change == "function":
        # The same weights, another model.
        second.model.config.rotary_base = 5000
    execute(second)
    assert scored == ["train", "train"]


def test_a_damaged_cache_is_made_again(tiny: Tiny, execute: Execute, tmp_path: Path, scored: list[str]) -> None:
    execute(tiny("first", held_out=0))
    (cache,) = caches(tmp_path)
    cache.write_bytes(cache.read_bytes()[:40])
    execute(tiny("second", held_out=0))
    assert scored == ["train", "train"]
    assert safetensors.torch.load_file(cache)["logps"].shape == (16, 2)


def test_a_resumed_run_without_its_cache_says_so(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    execute(tiny(held_out=0))
    caches(tmp_path)[0].unlink()
    recipe = tiny(held_out=0)
    recipe.trainer.max_steps = 6
    with pytest.raises(
        CheckpointError, match=r"reference.dir: .* is gone or damaged, or data.train is not what it was"
    ):
        execute(recipe)


def test_the_fingerprint_sees_every_bit_and_place() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    def mixed(data: torch.Tensor, offset: int = 0, rows: int = 4) -> int:
        piece = ShardedTensor(
            "w",
            data,
            data.dtype,
            tuple(data.shape),
            (rows, data.shape[1]),
            (offset, 0),
            (rows // len(data), 1),
        )
        return int(weights_hash._mix(piece))

    whole = torch.randn(4, 3)
    assert mixed(whole) == mixed(whole.clone())
    other = whole.clone()
    other[2, 1] = torch.nextafter(other[2, 1], torch.tensor(9.0))
    assert mixed(whole) != mixed(other)
    assert mixed(whole) != mixed(whole.flip(0))
    # Cut over two ranks, the parts add up to the whole.
    halves = torch.tensor([mixed(whole[:2], 0), mixed(whole[2:], 2)])
    assert int(halves.sum()) == mixed(whole)
