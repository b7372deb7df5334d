"""Which positions of a batch a context-parallel rank holds, and how what is spread over ranks comes together again.

With C ranks every sequence is cut into 2·C pieces of one length; rank r holds piece r and piece 2·C - 1 - r, so that
under causal attention all ranks have the same work. That is the cut that Megatron and Transformer Engine expect.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from aligner.batch import Batch


def size() -> int:
    """How many ranks share each sequence."""
    return parallel_state.get_context_parallel_world_size()


def rank() -> int:
    """Which of them this is; the first one counts the examples that all of them share."""
    return parallel_state.get_context_parallel_rank()


@functools.lru_cache(maxsize=256)
def held(lengths: tuple[int, ...], ranks: int) -> Tensor:
    """Positions that each rank holds of sequences that lie end to end, `[ranks, Σ lengths / ranks]`.

    Each length must be a multiple of `2 * ranks`.
    """
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    begin = 0
    for length in lengths:
        pieces = torch.arange(begin, begin + length).chunk(2 * ranks)
        for rank in range(ranks):
            found[rank] += [pieces[rank], pieces[2 * ranks - 1 - rank]]
        begin += length
    return torch.stack([torch.cat(pieces) for pieces in found])


def own(batch: Batch) -> Tensor:
    """Positions of each row of a batch that this rank holds, `[T / C]`."""
    lengths = [batch.tokens_RT.shape[1]] if batch.bounds is None else batch.bounds.diff().tolist()
    return held(tuple(lengths), size())[rank()].to(batch.tokens_RT.device)


def whole(part_RT: Tensor, batch: Batch) -> Tensor:
    """What the ranks hold of something that has one entry a position, put together on each of them, `[R, T]`.

    The gradient of what is made of it flows back to this rank's part alone; the ranks' gradients are added up with
    those of the weights.
    """
    if size() <= 1:
        return part_RT
    full = part_RT.new_zeros(batch.tokens_RT.shape)
    full = full.index_copy(1, own(batch), part_RT)
    return reduce_from_tensor_model_parallel_region(full, group=parallel_state.get_context_parallel_group())


def gathered(part: Tensor, lengths: list[int]) -> Tensor:
    """Keys or values of all ranks in the order of their positions; dimension 0 runs over the positions.

    The gradients of all ranks flow back to the one that holds a position.
    """
    group: Any = parallel_state.get_context_parallel_group()
    found = gather_from_sequence_parallel_region(part.contiguous(), group=group)
    return found[held(tuple(lengths), group.size()).flatten().argsort().to(part.device)]
