"""Objectives of single responses that are wanted or not, for preferences that do not come in pairs.

Dimension R: responses. As in `aligner.losses`, nothing here reduces over them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.losses.pairs import OneShape, check_hyperparameters


@dataclass(frozen=True, kw_only=True)
class ResponseLogprobs(OneShape):
    """What a loss of unpaired preferences may look at: R single responses."""

    policy: Tensor
    reference: Tensor
    length: Tensor
    desirable: Tensor
    """1 where the response is wanted, 0 where it is not."""
    kl: Tensor
    """How far the policy has moved from the reference, one estimate for the whole global batch, without gradient."""


def kto(
    responses: ResponseLogprobs,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    average_log_probs: bool = False,
) -> Tensor:
    """Kahneman-Tversky optimization of single responses, `[R]`: λ_D (1 - σ(β(r - z))) or λ_U (1 - σ(β(z - r))).

    The first where the response is desirable, r = log π(y|x) - log π_ref(y|x), and z = `kl` = max(0, mean of
    log π(y'|x) - log π_ref(y'|x)) over the global batch with answers y' of other prompts. λ/2 at the start. Keep
    λ_D · desirable ÷ (λ_U · undesirable responses) between 1 and 3/2, say the authors.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equation 8 (7 in the first version); z as in the first.
    """
    check_hyperparameters(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    reward = responses.policy - responses.reference
    if average_log_probs:
        reward = reward / responses.length
    gain = beta * (reward - responses.kl)
    wanted = responses.desirable > 0.5
    return torch.where(wanted, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
