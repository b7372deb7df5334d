"""Bradley-Terry ratings from comparisons with position bias, by choix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Winner = Literal["A", "B", "tie"]
FLAT = 1e-3
"""Ratings within this range count as equal."""
REGULAR = 0.01
"""Weight of the prior, which keeps ratings finite if an item wins every comparison."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of two items, shown as A (first) and B (second)."""

    first: int
    second: int
    winner: Winner | None
    """None: the judge's verdict cannot be parsed."""


@dataclass(frozen=True)
class Bias:
    """Wins per position, over comparisons with a winner."""

    first: int
    second: int

    @property
    def share(self) -> float:
        """Win rate of the first position; 0.5 without bias."""
        return self.first / (self.first + self.second) if self.first + self.second else 0.5

    @property
    def weights(self) -> tuple[float, float]:
        """ω₁ and ω₂, the weights of a win in the first and the second position: the other position's win rate.

        Wu et al. 2024, arXiv 2407.19594, section 2.3: ω₁ = win₂ / (win₁ + win₂), ω₂ = win₁ / (win₁ + win₂).
        """
        return 1 - self.share, self.share


def bias(comparisons: Iterable[Comparison]) -> Bias:
    """Count wins per position."""
    winners = [comparison.winner for comparison in comparisons]
    return Bias(winners.count("A"), winners.count("B"))


def ratings(count: int, comparisons: Iterable[Comparison], places: Bias) -> list[float] | None:
    """Fit Bradley-Terry ratings of `count` items, in log-odds (nats) with mean 0; None if all ratings are equal.

    P(i beats j) = sigmoid(r_i - r_j). The ratings maximize the likelihood, weighted by ω, with a small prior. Unparsed
    comparisons are ignored; a tie counts half for both items.
    """
    import numpy as np

    wins = np.zeros((count, count))
    first_weight, second_weight = places.weights
    for comparison in comparisons:
        i, j = comparison.first, comparison.second
        if comparison.winner == "A":
            wins[i, j] += first_weight
        elif comparison.winner == "B":
            wins[j, i] += second_weight
        elif comparison.winner == "tie":
            wins[i, j] += 0.25
            wins[j, i] += 0.25
    if not wins.any() or np.allclose(wins, wins.T):
        return None
    import choix

    fitted = choix.ilsr_pairwise_dense(wins, alpha=REGULAR)
    if fitted.max() - fitted.min() < FLAT:  # a cycle, for example
        return None
    return [float(value) for value in fitted - fitted.mean()]
