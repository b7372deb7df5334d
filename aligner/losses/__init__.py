"""Losses and metrics.

The loss functions (`dpo`, `ipo`, `kto`, ...) are pure: they map log-probabilities to one loss per example. `objective`
combines a loss with the SFT term; `metrics` reduces values over micro-batches and ranks. Read `pairs` first.
"""

from aligner.losses.pairs import (  # fmt: skip
    PairLogprobs,
    apo_down,
    apo_zero,
    dpo,
    exo_pair,
    hinge,
    ipo,
    log_ratios,
    margin,
    mix,
    nca_pair,
    orpo,
    robust_dpo,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
    simpo,
    sppo_hard,
)
from aligner.losses.unpaired import ResponseLogprobs, kto

__all__ = [
    "PairLogprobs", "ResponseLogprobs", "apo_down", "apo_zero", "dpo", "exo_pair", "hinge", "ipo", "kto", "log_ratios",
    "margin", "mix", "nca_pair", "orpo", "robust_dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "simpo", "sppo_hard",
]  # fmt: skip
