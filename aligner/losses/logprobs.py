"""From what a model says of tokens to what it says of responses.

Dimensions: S sequences (two a pair), R rows of T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def response_logprobs(token_nll_RT: Tensor, start_S: Tensor, length_S: Tensor) -> Tensor:
    """Log-probability of each response, `[S]` float32 in nats, summed over its tokens.

    log π(y|x) = -Σ_t nll_t over the `length_S[s]` positions from `start_S[s]` on, counted through all rows.
    `token_nll_RT` is the negative log-probability of the token that follows each position, as Megatron's
    vocabulary-parallel cross-entropy returns it (float32; whole on every tensor-parallel rank).

    The sum runs in float64, so that what a response is padded or packed with does not move its last bit.
    """
    nll = token_nll_RT.reshape(-1)
    within = torch.arange(int(length_S.max()), device=nll.device)
    scored = within < length_S[:, None]
    places = torch.where(scored, start_S[:, None] + within, 0)
    return -torch.where(scored, nll[places].double(), 0.0).sum(dim=-1).float()
