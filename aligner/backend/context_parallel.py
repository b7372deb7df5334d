"""Context parallelism: positions of each rank, and gathering over ranks.

With C ranks every sequence is cut into 2·C pieces of one length; rank r holds piece r and piece 2·C - 1 - r, so that
under causal attention all ranks have the same work. That is the cut that Megatron and Transformer Engine expect.
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
    """Number of ranks that share each sequence."""
    return parallel_state.get_context_parallel_world_size()


def cp_rank() -> int:
    """This rank's place among them. Rank 0 counts the examples that all of them share."""
    return parallel_state.get_context_parallel_rank()


@functools.lru_cache(maxsize=256)
def rank_positions(lengths: tuple[int, ...], ranks: int) -> Tensor:
    """Positions of each rank in concatenated sequences, `[ranks, Σ lengths / ranks]`.

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


def local_positions(lengths: Sequence[int]) -> Tensor:
    """Positions of this rank, `[Σ lengths / C]`, in a row that concatenates sequences of these lengths."""
    return rank_positions(tuple(lengths), cp_size())[cp_rank()]


def gather_tokens(part_RT: Tensor, lengths: Sequence[int]) -> Tensor:
    """Assemble per-position values of all ranks on each of them: `[R, T / C]` -> `[R, T]`.

    The gradient flows back to this rank's positions alone; gradients of different ranks are added up with those of the
    weights.
    """
    if cp_size() <= 1:
        return part_RT
    full_RT = part_RT.new_zeros(len(part_RT), sum(lengths))
    full_RT = full_RT.index_copy(1, local_positions(lengths).to(part_RT.device), part_RT)
    return reduce_from_tensor_model_parallel_region(full_RT, group=parallel_state.get_context_parallel_group())


def gather_keys(part: Tensor, lengths: list[int]) -> Tensor:
    """Keys or values of all ranks in the order of their positions; dimension 0 runs over the positions.

    The gradients of all ranks flow back to the one that holds a position.
    """
    group: Any = parallel_state.get_context_parallel_group()
    found = gather_from_sequence_parallel_region(part.contiguous(), group=group)
    return found[rank_positions(tuple(lengths), group.size()).flatten().argsort().to(part.device)]
