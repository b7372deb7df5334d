import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligner.callbacks import step_preparation
from aligner.callbacks.step_preparation import StepPreparation
from aligner.losses import metrics
from aligner.losses.metrics import WeightedValue


def sums(weights: list[float], **values: list[float]) -> torch.Tensor:
    return metrics.sums({name: WeightedValue(torch.tensor(v), torch.tensor(weights)) for name, v in values.items()})


def test_means_are_over_valid_examples_whatever_the_split_into_batches() -> None:
    whole = sums([1.0, 1, 1, 0], loss=[1.0, 2.0, 3.0, 99.0], acc=[1.0, 0.5, 0.0, 1.0])
    first = sums([1.0], loss=[1.0], acc=[1.0])
    rest = sums([1.0, 1.0, 0.0], loss=[2.0, 3.0, float("inf")], acc=[0.5, 0.0, 1.0])
    assert torch.equal(whole, first + rest)
    assert metrics.finalize(whole) == {"loss": 2.0, "acc": 0.5}


def test_duplicates_of_tensor_parallel_ranks_cancel() -> None:
    once = sums([1.0, 1.0], loss=[1.0, 4.0], rewards_chosen_mean=[0.5, 1.0], rewards_chosen_square=[0.25, 1.0])
    assert metrics.finalize(4 * once + metrics.empty()) == pytest.approx(metrics.finalize(once))


def test_reward_spread_is_over_all_rewards() -> None:
    chosen, rejected = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([-1.0, 9.0, 0.5])
    # The third chosen and the second rejected do not exist, as with single responses.
    measured = {}
    for side, reward, weight in (("chosen", chosen, [1.0, 1, 0]), ("rejected", rejected, [1.0, 0, 1])):
        measured[f"rewards_{side}_mean"] = WeightedValue(reward, torch.tensor(weight))
        measured[f"rewards_{side}_square"] = WeightedValue(reward**2, torch.tensor(weight))
    named = metrics.finalize(metrics.sums(measured))
    everything = torch.tensor([1.0, 3.0, -1.0, 0.5])
    assert named["rewards_all_mean"] == pytest.approx(everything.mean().item())
    assert named["rewards_all_std"] == pytest.approx(everything.std(correction=0).item())
    assert named["rewards_margin_mean"] == pytest.approx(2.0 - -0.25)


def test_what_is_not_a_number_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = sums([1.0, 1.0], rewards_chosen_mean=[1.0, math.nan], rewards_chosen_square=[1.0, math.nan])
    assert math.isnan(metrics.finalize(nan)["rewards_all_std"])

    def kl_of(*ratios: float) -> float:
        batch: Any = SimpleNamespace(valid_P=torch.ones(len(ratios)))
        scored = [(batch, torch.tensor(ratios)[:, None])]
        monkeypatch.setattr(step_preparation.scoring, "score_batches", lambda trainer, batches: scored)
        reduction: Any = SimpleNamespace(reference=None, objective=SimpleNamespace(average_log_probs=False))
        return StepPreparation(None, {}, None, seed=0)._kl(reduction, [batch])

    assert (kl_of(1.0, 2.0), kl_of(-1.0, -2.0)) == (1.5, 0.0)
    assert math.isnan(kl_of(1.0, math.nan))


def test_what_was_not_measured_has_no_value() -> None:
    assert metrics.finalize(metrics.empty()) == {}


def test_a_metric_that_nothing_reduces_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="nothing reduces"):
        sums([1.0], made_up=[1.0])
