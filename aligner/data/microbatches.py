"""How a global batch is cut into the micro-batches of each rank.

    padded            micro_batch_size examples, in order, padded to the longest of them
    length_grouped    the same, but of like lengths: the global batch is sorted by length before it is cut
    padding_free      the same as padded, but laid end to end
    packed            as many whole examples, laid end to end, as fit into micro_batch_size packs of packed_sequence_size tokens

Which examples a global batch holds is not decided here (`aligner.data.sampler`), and every example weighs the same wherever it
falls, so none of these changes what is learned; only what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from aligner.data.packing import pack

Batching = Literal["padded", "length_grouped", "padding_free", "packed"]

CONCATENATED: tuple[Batching, ...] = ("padding_free", "packed")

Microbatch = list[tuple[int, bool]]
"""Rows of a micro-batch; False for a copy that only fills a place and weighs nothing."""


@dataclass(frozen=True)
class MicrobatchSplitter:
    """How to cut; called with the units of a global batch."""

    batching: Batching
    micro_batch_size: int
    packed_sequence_size: int
    tokens: np.ndarray
    """Positions that each row takes when it is packed, `[rows]`."""
    longest: np.ndarray
    """Tokens of the longest sequence of each row, `[rows]`."""
    every: int = 1
    """Each rank gets a multiple of so many micro-batches; interleaved pipelines go round in rows of their stages."""
    packs: Sequence[np.ndarray] | None = None
    """Rows of each unit, if the data was packed ahead of time; units beyond them, and otherwise all, are rows."""

    @property
    def concatenated(self) -> bool:
        """Whether sequences are laid end to end rather than padded."""
        return self.batching in CONCATENATED or self.packs is not None

    def __call__(self, units: np.ndarray, ranks: int) -> list[list[Microbatch]]:
        """The micro-batches of each rank; every rank has as many, and none is empty."""
        if self.packs is not None:
            count = len(self.packs)
            rows = [self.packs[unit] if unit < count else [unit - count] for unit in units]
            return self._dealt([[(int(row), True) for row in unit] for unit in rows], ranks)
        if self.batching == "packed":
            return self._packed(units, ranks)
        if self.batching == "length_grouped":
            units = units[np.argsort(self.longest[units], kind="stable")]
        return self._dealt([[(int(unit), True)] for unit in units], ranks)

    def _dealt(self, units: list[Microbatch], ranks: int) -> list[list[Microbatch]]:
        """`micro_batch_size` units to a micro-batch, filled up with copies at the end; dealt to the ranks in turn."""
        size = self.micro_batch_size
        missing = -len(units) % (ranks * size * self.every)
        units = units + [[(row, False) for row, _ in units[0]]] * missing
        micros = [[row for unit in units[i : i + size] for row in unit] for i in range(0, len(units), size)]
        return [micros[rank::ranks] for rank in range(ranks)]

    def _packed(self, units: np.ndarray, ranks: int) -> list[list[Microbatch]]:
        lengths = self.tokens[units]
        packs = pack(lengths, self.micro_batch_size * self.packed_sequence_size)
        # As many for every rank: the fullest in number are halved until it comes out even.
        rank_zero_first = ranks * self.every
        while len(packs) % rank_zero_first and len(packs) < len(units):
            largest = max(range(len(packs)), key=lambda i: len(packs[i]))
            whole = packs[largest]
            packs[largest], half = whole[::2], whole[1::2]
            packs.append(half)
        packs.sort(key=lambda places: -int(lengths[places].sum()))
        micros: list[Microbatch] = [[(int(units[place]), True) for place in places] for places in packs]
        micros += [[(int(units[lengths.argmin()]), False)]] * (-len(micros) % rank_zero_first)
        # There and back, so that no rank gets the longest of every round.
        rounds = [micros[i : i + ranks] for i in range(0, len(micros), ranks)]
        return [[r[rank if i % 2 == 0 else ranks - 1 - rank] for i, r in enumerate(rounds)] for rank in range(ranks)]
