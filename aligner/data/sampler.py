"""In which order rows are learned from: a function of (seed, epoch) alone, never of ranks or micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GlobalBatchSampler:
    """The order of the units (examples, or packs made ahead of time) of files with `sizes` of them."""

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()
    """Shares of an epoch, a file each; none: every unit comes once."""

    def epoch(self, epoch: int) -> np.ndarray:
        """All units of one epoch."""
        if self.weights:
            return blended(self.seed, epoch, self.sizes, self.weights)
        return permutation(self.seed, epoch, sum(self.sizes))

    def global_batch(self, step: int, size: int) -> np.ndarray:
        """The units of an optimizer step; those that do not fill a last global batch sit out the epoch."""
        epoch, within = divmod(step, sum(self.sizes) // size)
        return self.epoch(epoch)[within * size : (within + 1) * size]


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of all `rows` rows in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


@functools.lru_cache(maxsize=2)
def blended(seed: int, epoch: int, sizes: tuple[int, ...], weights: tuple[float, ...]) -> np.ndarray:
    """The rows of one epoch of a blend, in order; files have `sizes` rows, numbered on from file to file.

    An epoch is as long as all files together, and `weights` share it out. A file that gives fewer rows than it has
    goes on in the next epoch with those that have not come yet; one that gives more begins again, in another order.
    So after any number of epochs no row of a file has come twice more than another.
    """
    order, before = [], 0
    for number, (size, count) in enumerate(zip(sizes, counts(sizes, weights), strict=True)):
        first, last = epoch * count, (epoch + 1) * count
        for turn in range(first // size, -(-last // size)):
            rows = np.random.default_rng([seed, number, turn]).permutation(size)
            order.append(before + rows[max(0, first - turn * size) : last - turn * size])
        before += size
    rows = np.concatenate(order)
    return rows[permutation(seed, epoch, len(rows))]


def counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows each file gives to an epoch; they add up to the rows that there are."""
    exact = np.asarray(weights) / np.sum(weights) * np.sum(sizes)
    found = np.floor(exact).astype(int)
    # Largest remainders first.
    for number in np.argsort(found - exact, kind="stable")[: int(np.sum(sizes) - found.sum())]:
        found[number] += 1
    return found.tolist()
