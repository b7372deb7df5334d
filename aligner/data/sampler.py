"""Training order: a function of (seed, epoch) alone, independent of ranks and micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Order of the samples (examples, or packs made ahead of time) of files; `sizes` contains their sample counts."""

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()
    """Share of an epoch of each file; empty: each sample occurs once per epoch."""

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the samples of one epoch, in order."""
        if self.weights:
            return blend(self.seed, epoch, self.sizes, self.weights)
        return permutation(self.seed, epoch, sum(self.sizes))

    def global_batch(self, step: int, size: int) -> np.ndarray:
        """Return the samples of an optimizer step.

        Samples that do not fill a last global batch are left out of an epoch: by turns, so that after any number of
        epochs two samples were trained on equally often, or once more. (With weights, those at the end of the epoch.)
        """
        samples = sum(self.sizes)
        epoch, within = divmod(step, samples // size)
        order = self.epoch(epoch) if self.weights else whole_batches(self.seed, epoch, samples, size)
        return order[within * size : (within + 1) * size]


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Return the order of the `rows` rows in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


@functools.lru_cache(maxsize=2)
def whole_batches(seed: int, epoch: int, rows: int, size: int) -> np.ndarray:
    """Return the order of one epoch without the rows that do not fill a batch of `size`, which take turns."""
    order, left = permutation(seed, epoch, rows), rows % size
    # The turns go backwards through the first epoch's order, at the end of which nothing has been left out yet.
    turn = permutation(seed, 0, rows)[(rows - left * (epoch + 1) + np.arange(left)) % rows]
    return order[~np.isin(order, turn)]


@functools.lru_cache(maxsize=2)
def blend(seed: int, epoch: int, sizes: tuple[int, ...], weights: tuple[float, ...]) -> np.ndarray:
    """Return the rows of one epoch of a blend, in order; row numbers are consecutive over files with `sizes` rows.

    An epoch has as many rows as all files together, divided by `weights`. A file that contributes fewer rows than it
    has continues in the next epoch with its unused rows; a file that contributes more repeats in another order. After
    any number of epochs, the usage counts of two rows of a file differ by at most 1.
    """
    order, offset = [], 0
    for number, (size, count) in enumerate(zip(sizes, counts(sizes, weights), strict=True)):
        first, last = epoch * count, (epoch + 1) * count
        for file_epoch in range(first // size, -(-last // size)):
            rows = np.random.default_rng([seed, number, file_epoch]).permutation(size)
            order.append(offset + rows[max(0, first - file_epoch * size) : last - file_epoch * size])
        offset += size
    rows = np.concatenate(order)
    return rows[permutation(seed, epoch, len(rows))]


def counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return each file's number of rows per epoch; the numbers add up to all rows."""
    exact = np.asarray(weights) / np.sum(weights) * np.sum(sizes)
    rows = np.floor(exact).astype(int)
    # Largest remainders first.
    for number in np.argsort(rows - exact, kind="stable")[: int(np.sum(sizes) - rows.sum())]:
        rows[number] += 1
    return rows.tolist()
