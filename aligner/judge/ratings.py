"""Ratings from comparisons in which places may count: Bradley-Terry, by choix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Winner = Literal["A", "B", "tie"]
FLAT = 1e-3
"""Ratings that differ by no more tell nothing apart."""
REGULAR = 0.01
"""Weight of the prior that keeps ratings finite where one wins every time."""


@dataclass(frozen=True)
class Comparison:
    """What a judge said of two, one shown first."""

    first: int
    second: int
    winner: Winner | None
    """A: the first one; None: it could not be read."""


@dataclass(frozen=True)
class Bias:
    """How often each place won, over comparisons that have a winner."""

    first: int
    second: int

    @property
    def share(self) -> float:
        """Of the first place; 0.5 is no bias."""
        return self.first / (self.first + self.second) if self.first + self.second else 0.5

    @property
    def weights(self) -> tuple[float, float]:
        """ω₁ and ω₂ of a win in the first and in the second place: what the other place won, over both.

        Wu et al. 2024, arXiv 2407.19594, section 2.3: ω₁ = win₂ / (win₁ + win₂), ω₂ = win₁ / (win₁ + win₂).
        """
        return 1 - self.share, self.share


def bias(comparisons: Iterable[Comparison]) -> Bias:
    """Count wins by place."""
    winners = [comparison.winner for comparison in comparisons]
    return Bias(winners.count("A"), winners.count("B"))


def ratings(count: int, comparisons: Iterable[Comparison], places: Bias) -> list[float] | None:
    """Bradley-Terry ratings of `count` items, in nats of odds, their mean 0; None if nothing tells them apart.

    P(i beats j) = sigmoid(r_i - r_j), the maximum of the likelihood weighed by ω and a small prior. Battles that cannot
    be read count for nothing; a tie counts half for both.
    """
    import numpy as np

    wins = np.zeros((count, count))
    first, second = places.weights
    for comparison in comparisons:
        i, j = comparison.first, comparison.second
        if comparison.winner == "A":
            wins[i, j] += first
        elif comparison.winner == "B":
            wins[j, i] += second
        elif comparison.winner == "tie":
            wins[i, j] += 0.25
            wins[j, i] += 0.25
    if not wins.any() or np.allclose(wins, wins.T):
        return None
    import choix

    found = choix.ilsr_pairwise_dense(wins, alpha=REGULAR)
    if found.max() - found.min() < FLAT:  # a cycle, for example
        return None
    return [float(value) for value in found - found.mean()]
