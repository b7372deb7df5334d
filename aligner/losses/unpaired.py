"""Losses of unpaired preferences: single responses, each desirable or undesirable.

Dimension R: responses. As in `aligner.losses`, no loss reduces over responses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.losses.pairs import OneShape, check_hyperparameters


@dataclass(frozen=True, kw_only=True)
class ResponseLogprobs(OneShape):
    """Inputs of a loss of unpaired preferences: R single responses."""

    policy: Tensor
    reference: Tensor
    length: Tensor
    desirable: Tensor
    """1 for a desirable response, 0 for an undesirable one."""
    kl: Tensor
    """Estimate of KL(π ‖ π_ref), one value for the global batch, without gradient."""


def kto(
    responses: ResponseLogprobs,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    average_log_probs: bool = False,
) -> Tensor:
    """Kahneman-Tversky optimization of single responses, `[R]`: λ_D (1 - σ(β(r - z))) or λ_U (1 - σ(β(z - r))).

    The first formula applies to desirable responses. r = log π(y|x) - log π_ref(y|x). z = `kl` = max(0, mean of
    log π(y'|x) - log π_ref(y'|x)) over the global batch with responses y' of other prompts. λ/2 at the start. The
    authors recommend λ_D · desirable ÷ (λ_U · undesirable responses) between 1 and 3/2.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equation 8 (7 in the first version); z as in the first.
    """
    check_hyperparameters(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    reward = responses.policy - responses.reference
    if average_log_probs:
        reward = reward / responses.length
    gain = beta * (reward - responses.kl)
    desirable = responses.desirable > 0.5
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
