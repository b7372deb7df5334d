"""From units in order to the micro-batches that one rank is given, a global batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from megatron.core import parallel_state
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import Dataset

from aligner.data.batch import Batch, Item
from aligner.data.dataset import TokenizedDataset
from aligner.data.microbatches import MicrobatchSplitter


class GlobalBatchDataset(Dataset[list[Batch]]):
    """Global batches as one rank sees them: entry i is the micro-batches of step i."""

    def __init__(
        self,
        corpus: TokenizedDataset,
        units: Callable[[int], np.ndarray],
        steps: int,
        *,
        cutting: MicrobatchSplitter,
        rank: int,
        ranks: int,
        collate: Callable[..., Batch],
    ) -> None:
        self.corpus, self.units, self.steps, self.cutting = corpus, units, steps, cutting
        self.rank, self.ranks, self.collate = rank, ranks, collate

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        micros = self.cutting(self.units(step), self.ranks)[self.rank]
        items = [[self._item(row, valid) for row, valid in micro] for micro in micros]
        batches = [self.collate(micro) for micro in items]
        if self.cutting.every == 1:
            return batches
        # Interleaved pipelines pass all micro-batches of a step on in one shape.
        shapes = [{b.tokens_RT.shape[1] for b in (batch, batch.mismatched) if b is not None} for batch in batches]
        longest = max(set.union(*shapes))
        return [
            batch if shape == {longest} else self.collate(micro, at_least=longest)
            for micro, batch, shape in zip(items, batches, shapes, strict=True)
        ]

    def _item(self, row: int, valid: bool) -> Item:
        other = self.corpus.mismatched(row)
        return Item(row, self.corpus[row], valid, None if other is None else Item(other, self.corpus[other], valid))


class StepSampler(torch.utils.data.Sampler[int]):
    """The steps from `first` on; as long as all of them, since Lightning counts those of earlier jobs along."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.steps))

    def __len__(self) -> int:
        return self.steps


def loader(
    corpus: TokenizedDataset,
    units: Callable[[int], np.ndarray],
    steps: StepSampler,
    *,
    cutting: MicrobatchSplitter,
    collate: Callable[..., Batch],
    mode: str,
    num_workers: int,
) -> WrappedDataLoader:
    """What Lightning iterates: a list of micro-batches for each step; `units(step)` are those of its global batch."""
    known = parallel_state.is_initialized()
    view = GlobalBatchDataset(
        corpus,
        units,
        len(steps),
        cutting=cutting,
        rank=parallel_state.get_data_parallel_rank() if known else 0,
        ranks=parallel_state.get_data_parallel_world_size() if known else 1,
        collate=collate,
    )
    return WrappedDataLoader(
        mode=mode,
        dataset=view,
        sampler=steps,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
