"""Response log-probabilities from token log-probabilities.

Dimensions: S sequences (two per pair), R rows of T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def response_logprobs(token_nll_RT: Tensor, start_S: Tensor, length_S: Tensor) -> Tensor:
    """Sum token log-probabilities over each response: `[S]` float32, nats.

    log π(y|x) = -Σ_t nll_t over `length_S[s]` positions from `start_S[s]`, an index into the flattened rows.
    `token_nll_RT` is the negative log-probability of the token after each position, as returned by Megatron's
    vocabulary-parallel cross-entropy (float32; complete on every tensor-parallel rank).

    The sum uses float64: padding and packing do not change its last bit.
    """
    nll = token_nll_RT.reshape(-1)
    offsets = torch.arange(int(length_S.max()), device=nll.device)
    scored = offsets < length_S[:, None]
    positions = torch.where(scored, start_S[:, None] + offsets, 0)
    return -torch.where(scored, nll[positions].double(), 0.0).sum(dim=-1).float()
