"""Threads of runs on CPUs."""

import os
from collections.abc import Callable
from typing import Any

import nemo_run as run
import pytest
import torch

from aligner.backend import distributed, threads
from aligner.losses.pairs import PairLogprobs, dpo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes")


SEEN: list[int] = []


def counting(pairs: PairLogprobs) -> torch.Tensor:
    """DPO, and how many threads compute it."""
    SEEN.append(torch.get_num_threads())
    return dpo(pairs)


@pytest.fixture
def two() -> Any:
    """A process that computes with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two")
def test_a_small_model_has_one_thread_while_it_runs(
    tiny: Callable[..., Any], execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    recipe = tiny()
    recipe.loss = run.Partial(counting)
    execute(recipe)
    # The checks before the run call the loss once, too.
    assert set(SEEN[1:]) == {1} and len(SEEN) > recipe.trainer.max_steps
    assert torch.get_num_threads() == 2 and "OMP_NUM_THREADS" not in os.environ, "it is given back"


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("variable", "hidden_size", "expected"), [(None, 128, 1), (None, threads.SMALL, 2), ("2", 128, 2)]
)
def test_the_number_is_by_size_and_the_environments_counts(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, hidden_size: int, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with distributed.preserved_environment():
        threads.choose_num_threads(hidden_size)
        assert torch.get_num_threads() == expected
