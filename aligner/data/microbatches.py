"""Division of a global batch into the micro-batches of each rank.

    padded            micro_batch_size examples, in order, padded to the longest sequence
    length_grouped    as padded, but the global batch is sorted by length first, which reduces padding
    padding_free      as padded, but concatenated instead of padded
    packed            as many whole examples, concatenated, as fit into micro_batch_size packs of
                      packed_sequence_size tokens

`aligner.data.sampler` selects the samples of a global batch. Every example has the same weight in every micro-batch, so
the method changes the cost of training, not its result.
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
"""(Row, valid) of each example; a copy that fills a place is not valid and has zero weight."""


@dataclass(frozen=True)
class MicrobatchSplitter:
    """Splitter of global batches; a callable on the sample indices of one global batch."""

    batching: Batching
    micro_batch_size: int
    packed_sequence_size: int
    tokens: np.ndarray
    """Packed positions of each row, `[rows]`."""
    longest: np.ndarray
    """Longest sequence of each row, in tokens, `[rows]`."""
    microbatch_multiple: int = 1
    """Divisor of each rank's number of micro-batches; an interleaved pipeline requires a multiple of its stages."""
    packs: Sequence[np.ndarray] | None = None
    """Rows of each pack packed ahead of time, if any; samples beyond the packs (all samples if None) are rows."""

    @property
    def concatenated(self) -> bool:
        """Whether sequences are concatenated instead of padded."""
        return self.batching in CONCATENATED or self.packs is not None

    def __call__(self, samples: np.ndarray, ranks: int) -> list[list[Microbatch]]:
        """Return the micro-batches of each rank: equal counts, none empty."""
        if self.packs is not None:
            count = len(self.packs)
            rows = [self.packs[sample] if sample < count else [sample - count] for sample in samples]
            return self._fixed_size([[(int(row), True) for row in sample] for sample in rows], ranks)
        if self.batching == "packed":
            return self._packed(samples, ranks)
        if self.batching == "length_grouped":
            samples = samples[np.argsort(self.longest[samples], kind="stable")]
        return self._fixed_size([[(int(sample), True)] for sample in samples], ranks)

    def _fixed_size(self, samples: list[Microbatch], ranks: int) -> list[list[Microbatch]]:
        """Group `micro_batch_size` samples per micro-batch, append copies, and assign micro-batches round-robin."""
        size = self.micro_batch_size
        missing = -len(samples) % (ranks * size * self.microbatch_multiple)
        samples = samples + [[(row, False) for row, _ in samples[0]]] * missing
        micros = [[row for sample in samples[i : i + size] for row in sample] for i in range(0, len(samples), size)]
        return [micros[rank::ranks] for rank in range(ranks)]

    def _packed(self, samples: np.ndarray, ranks: int) -> list[list[Microbatch]]:
        lengths = self.tokens[samples]
        packs = pack(lengths, self.micro_batch_size * self.packed_sequence_size)
        # Every rank needs the same number of packs: halve the packs with the most examples until the number divides.
        divisor = ranks * self.microbatch_multiple
        while len(packs) % divisor and len(packs) < len(samples):
            largest = max(range(len(packs)), key=lambda i: len(packs[i]))
            whole = packs[largest]
            packs[largest], half = whole[::2], whole[1::2]
            packs.append(half)
        packs.sort(key=lambda places: -int(lengths[places].sum()))
        micros: list[Microbatch] = [[(int(samples[place]), True) for place in places] for places in packs]
        micros += [[(int(samples[lengths.argmin()]), False)]] * (-len(micros) % divisor)
        # Alternate the direction; otherwise one rank would get the longest micro-batch of every round.
        rounds = [micros[i : i + ranks] for i in range(0, len(micros), ranks)]
        return [[r[rank if i % 2 == 0 else ranks - 1 - rank] for i, r in enumerate(rounds)] for rank in range(ranks)]
