"""Context parallelism: positions of each rank, and gathering over ranks.

With C ranks, every sequence is split into 2·C pieces of equal length. Rank r has pieces r and 2·C - 1 - r, which
balances the work of causal attention. Megatron and Transformer Engine expect this split.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def cp_size() -> int:
    """Return the number of ranks that share each sequence."""
    return parallel_state.get_context_parallel_world_size()


def cp_rank() -> int:
    """Return this rank's index in its context-parallel group; rank 0 counts the group's examples."""
    return parallel_state.get_context_parallel_rank()


@functools.lru_cache(maxsize=256)
def rank_positions(lengths: tuple[int, ...], ranks: int) -> Tensor:
    """Compute each rank's positions in concatenated sequences, `[ranks, Σ lengths / ranks]`.

    Each length must be a multiple of `2 * ranks`.
    """
    positions: list[list[Tensor]] = [[] for _ in range(ranks)]
    begin = 0
    for length in lengths:
        pieces = torch.arange(begin, begin + length).chunk(2 * ranks)
        for rank in range(ranks):
            positions[rank] += [pieces[rank], pieces[2 * ranks - 1 - rank]]
        begin += length
    return torch.stack([torch.cat(pieces) for pieces in positions])


def local_positions(lengths: Sequence[int]) -> Tensor:
    """Compute this rank's positions, `[Σ lengths / C]`, in a row of concatenated sequences of these lengths."""
    return rank_positions(tuple(lengths), cp_size())[cp_rank()]


def gather_tokens(part_RT: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gather per-position values of all ranks on every rank: `[R, T / C]` -> `[R, T]`.

    Backward passes the gradient to this rank's positions only; the reduction of the weights' gradients sums over ranks.
    """
    if cp_size() <= 1:
        return part_RT
    full_RT = part_RT.new_zeros(len(part_RT), sum(lengths))
    full_RT = full_RT.index_copy(1, local_positions(lengths).to(part_RT.device), part_RT)
    return reduce_from_tensor_model_parallel_region(full_RT, group=parallel_state.get_context_parallel_group())


def gather_keys(part: Tensor, lengths: list[int]) -> Tensor:
    """Gather the keys or values of all ranks in the order of positions; dimension 0 is the position.

    Backward sums the gradients of all ranks on the rank of each position.
    """
    group: Any = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(part.contiguous(), group=group)
    return gathered[rank_positions(tuple(lengths), group.size()).flatten().argsort().to(part.device)]
