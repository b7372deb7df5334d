"""Hash of a model's weights, independent of the parallel layout."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor

_ODD = (-7046029254386353131, 6364136223846793005, -4658895280553007687)  # odd 64-bit mixing constants


def weights_hash(model: Any) -> str:
    """Hash a Megatron model's weights, equal in every parallel layout; every rank must call.

    Each element is mixed with its parameter's name and its index in the full parameter. The sum of the mixed numbers
    modulo 2^64 does not depend on the distribution over ranks.
    """
    # Pieces of named global tensors; this rank adds its main replicas.
    state = model.sharded_state_dict()
    apply_factories(state)
    first = next(model.parameters())
    total = torch.zeros((), dtype=torch.int64, device=first.device)
    for piece in nested_values(state):
        if isinstance(piece, ShardedTensor) and piece.data is not None and is_main_replica(piece.replica_id):
            total += _mix(piece).to(first.device)
    torch.distributed.all_reduce(total)
    return f"{int(total) & 0xFFFFFFFFFFFFFFFF:016x}"


@torch.no_grad()
def _mix(piece: ShardedTensor) -> Tensor:
    data = piece.data
    assert data is not None
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    bits = data.detach().contiguous().view(integer).reshape(data.shape)
    index = torch.zeros(data.shape, dtype=torch.int64, device=data.device)
    extra = len(piece.global_shape) - data.dim()
    for axis, (size, offset) in enumerate(zip(piece.global_shape, piece.global_offset, strict=True)):
        index *= size
        index += offset
        if axis >= extra:
            offsets = torch.arange(data.shape[axis - extra], device=data.device)
            index += offsets.reshape([-1] + [1] * (data.dim() - 1 - (axis - extra)))
    salt = int.from_bytes(hashlib.sha256(piece.key.encode()).digest()[:8], "little", signed=True)
    mixed = (bits.long() + salt) ^ (index * _ODD[0])
    mixed = mixed * _ODD[1]
    return ((mixed ^ (mixed >> 29)) * _ODD[2]).sum()
