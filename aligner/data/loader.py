"""Data loader: the micro-batches of one rank, one global batch at a time."""

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
    """Global batches of one rank: item i is the list of micro-batches of step i."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        samples: Callable[[int], np.ndarray],
        steps: int,
        *,
        splitter: MicrobatchSplitter,
        rank: int,
        ranks: int,
        collate: Callable[..., Batch],
    ) -> None:
        self.dataset, self.samples, self.steps, self.splitter = dataset, samples, steps, splitter
        self.rank, self.ranks, self.collate = rank, ranks, collate

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch]:
        micros = self.splitter(self.samples(step), self.ranks)[self.rank]
        items = [[self._item(row, valid) for row, valid in micro] for micro in micros]
        batches = [self.collate(micro) for micro in items]
        if self.splitter.microbatch_multiple == 1:
            return batches
        # An interleaved pipeline requires one shape for all micro-batches of a step.
        shapes = [{b.tokens_RT.shape[1] for b in (batch, batch.mismatched) if b is not None} for batch in batches]
        longest = max(set.union(*shapes))
        return [
            batch if shape == {longest} else self.collate(micro, at_least=longest)
            for micro, batch, shape in zip(items, batches, shapes, strict=True)
        ]

    def _item(self, row: int, valid: bool) -> Item:
        other = self.dataset.mismatched(row)
        return Item(row, self.dataset[row], valid, None if other is None else Item(other, self.dataset[other], valid))


class StepSampler(torch.utils.data.Sampler[int]):
    """Step indices from `first` on; `len` counts all steps, because Lightning counts those of earlier jobs."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.steps))

    def __len__(self) -> int:
        return self.steps


def loader(
    dataset: TokenizedDataset,
    samples: Callable[[int], np.ndarray],
    steps: StepSampler,
    *,
    splitter: MicrobatchSplitter,
    collate: Callable[..., Batch],
    mode: str,
    num_workers: int,
) -> WrappedDataLoader:
    """Build a loader of micro-batch lists, one list per step; `samples(step)` returns the global batch."""
    distributed = parallel_state.is_initialized()
    batches = GlobalBatchDataset(
        dataset,
        samples,
        len(steps),
        splitter=splitter,
        rank=parallel_state.get_data_parallel_rank() if distributed else 0,
        ranks=parallel_state.get_data_parallel_world_size() if distributed else 1,
        collate=collate,
    )
    return WrappedDataLoader(
        mode=mode,
        dataset=batches,
        sampler=steps,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
