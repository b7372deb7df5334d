"""From the examples of a batch to named scalars, exact over micro-batches, ranks and unequal batches.

Every metric is a ratio of two sums over examples: of what was measured, and of what each weighs. Ranks add up their
sums in one all-reduce over the whole world: pipeline stages that see no loss add zeros, and tensor-parallel ranks,
which all see the same examples, multiply numerator and denominator alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NAMES: tuple[str, ...] = (
    "loss", "preference_loss", "sft_loss", "acc", "kl", "rewards_chosen_mean", "rewards_rejected_mean",
    "rewards_chosen_square", "rewards_rejected_square", "logps_chosen_mean", "logps_rejected_mean", "chosen_lengths",
    "rejected_lengths", "tokens", "step0_loss", "step0_error",
)  # fmt: skip
"""What may be measured; an objective measures some of it (`aligner.losses.objective`)."""

INTERNAL = ("rewards_chosen_square", "rewards_rejected_square", "tokens", "step0_loss", "step0_error")
"""Metrics that others are made of, or that gates look at; not logged themselves."""

LOGGED = (
    "loss", "preference_loss", "sft_loss", "acc", "kl", "rewards_chosen_mean", "rewards_rejected_mean",
    "rewards_margin_mean", "rewards_all_mean", "rewards_all_std", "logps_chosen_mean", "logps_rejected_mean",
    "chosen_lengths", "rejected_lengths",
)  # fmt: skip


class WeightedValue(NamedTuple):
    """A value of each example, `[P]`, and its weight in the mean, `[P]`."""

    value_P: Tensor
    weight_P: Tensor


@torch.no_grad()
def sums(measured: Mapping[str, WeightedValue]) -> Tensor:
    """Σ weight · value and Σ weight of every name, `[names, 2]` float64; zeros for what was not measured."""
    assert set(measured) <= set(NAMES), f"metrics that nothing reduces: {set(measured) - set(NAMES)}"
    total = torch.zeros(len(NAMES), 2, dtype=torch.float64)
    for i, name in enumerate(NAMES):
        if name in measured:
            value, weight = (x.detach().double() for x in measured[name])
            # A weightless copy may hold anything, even an infinity.
            product = torch.where(weight > 0, value * weight, 0.0)
            total = total.to(value.device)
            total[i] = torch.stack([product.sum(), weight.sum()])
    return total


def empty(device: torch.device | str = "cpu") -> Tensor:
    """Sums over no examples."""
    return torch.zeros(len(NAMES), 2, dtype=torch.float64, device=device)


def all_reduce_sums(total: Tensor) -> Tensor:
    """The sums of all ranks, on every rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = total.clone()
        torch.distributed.all_reduce(total)
    return total


def finalize(total: Tensor) -> dict[str, float]:
    """Reduced sums as metrics, those of `INTERNAL` among them; what was not measured is left out."""
    weights = dict(zip(NAMES, total[:, 1].tolist(), strict=True))
    found = {
        name: value / weights[name] for name, value in zip(NAMES, total[:, 0].tolist(), strict=True) if weights[name]
    }
    sides = [side for side in ("chosen", "rejected") if f"rewards_{side}_mean" in found]
    if len(sides) == 2:
        found["rewards_margin_mean"] = found["rewards_chosen_mean"] - found["rewards_rejected_mean"]
    if sides:
        share = {side: weights[f"rewards_{side}_mean"] for side in sides}
        mean = sum(found[f"rewards_{side}_mean"] * share[side] for side in sides) / sum(share.values())
        square = sum(found[f"rewards_{side}_square"] * share[side] for side in sides) / sum(share.values())
        found["rewards_all_mean"] = mean
        found["rewards_all_std"] = max(0.0, square - mean**2) ** 0.5
    return found
