"""Metrics: weighted means over examples, exact over micro-batches, ranks and unequal batches.

Every metric is a ratio of two sums over examples: Σ weight · value and Σ weight. One all-reduce over the world adds
the sums of all ranks. Pipeline stages without a loss add zeros. Tensor-parallel ranks have the same examples, which
scales numerator and denominator alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NAMES: tuple[str, ...] = (
    "loss", "preference_loss", "sft_loss", "acc", "kl", "rewards_chosen_mean", "rewards_rejected_mean",
    "rewards_chosen_square", "rewards_rejected_square", "logps_chosen_mean", "logps_rejected_mean", "chosen_lengths",
    "rejected_lengths", "chosen_generated_rewards", "rejected_generated_rewards", "tokens", "step0_loss", "step0_error",
)  # fmt: skip
"""Names of all metrics; an objective computes a subset (`aligner.losses.objective`)."""

INTERNAL = ("rewards_chosen_square", "rewards_rejected_square", "tokens", "step0_loss", "step0_error")
"""Inputs of other metrics or of the sanity checks; not logged themselves."""

LOGGED = (
    "loss", "preference_loss", "sft_loss", "acc", "kl", "rewards_chosen_mean", "rewards_rejected_mean",
    "rewards_margin_mean", "rewards_all_mean", "rewards_all_std", "logps_chosen_mean", "logps_rejected_mean",
    "chosen_lengths", "rejected_lengths", "chosen_generated_rewards", "rejected_generated_rewards",
)  # fmt: skip


class WeightedValue(NamedTuple):
    """Value of each example, `[P]`, and its weight in the mean, `[P]`."""

    value_P: Tensor
    weight_P: Tensor


@torch.no_grad()
def sums(measured: Mapping[str, WeightedValue]) -> Tensor:
    """Sum weight · value and weight of every metric, `[names, 2]` float64; zeros for metrics not in `measured`."""
    assert set(measured) <= set(NAMES), f"metrics that nothing reduces: {set(measured) - set(NAMES)}"
    total = torch.zeros(len(NAMES), 2, dtype=torch.float64)
    for i, name in enumerate(NAMES):
        if name in measured:
            value, weight = (x.detach().double() for x in measured[name])
            # The value of an example with weight 0 is arbitrary, even infinite.
            product = torch.where(weight > 0, value * weight, 0.0)
            total = total.to(value.device)
            total[i] = torch.stack([product.sum(), weight.sum()])
    return total


def empty(device: torch.device | str = "cpu") -> Tensor:
    """Return sums over no examples: zeros."""
    return torch.zeros(len(NAMES), 2, dtype=torch.float64, device=device)


def all_reduce_sums(total: Tensor) -> Tensor:
    """Add the sums of all ranks, on every rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = total.clone()
        torch.distributed.all_reduce(total)
    return total


def finalize(total: Tensor) -> dict[str, float]:
    """Compute metrics from reduced sums, including `INTERNAL`; metrics without weight are omitted."""
    weights = dict(zip(NAMES, total[:, 1].tolist(), strict=True))
    values = {
        name: value / weights[name] for name, value in zip(NAMES, total[:, 0].tolist(), strict=True) if weights[name]
    }
    sides = [side for side in ("chosen", "rejected") if f"rewards_{side}_mean" in values]
    if len(sides) == 2:
        values["rewards_margin_mean"] = values["rewards_chosen_mean"] - values["rewards_rejected_mean"]
    if sides:
        weight = {side: weights[f"rewards_{side}_mean"] for side in sides}
        mean = sum(values[f"rewards_{side}_mean"] * weight[side] for side in sides) / sum(weight.values())
        square = sum(values[f"rewards_{side}_square"] * weight[side] for side in sides) / sum(weight.values())
        values["rewards_all_mean"] = mean
        values["rewards_all_std"] = floored(square - mean**2) ** 0.5
    return values


def floored(value: float) -> float:
    """Return max(0, value), and NaN for NaN, of which Python's `max(0.0, value)` makes 0."""
    return 0.0 if value < 0 else value
