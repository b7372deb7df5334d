"""What theory says of a run's first step, checked, so that a wrong set-up costs minutes and not days."""

from __future__ import annotations

import math

import torch

from aligner.common.errors import SanityCheckError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Nats a token by which policy and reference may differ at step 0: float32 rounds differently when a batch has
another shape; half precision rounds every activation."""


def check_policy_matches_reference(found: dict[str, float], dtype: torch.dtype) -> None:
    """At step 0 the policy is the reference, so rewards are 0 and the loss is its known constant (ln 2 for DPO).

    Raises:
        GateError: it is not.
    """
    if not math.isfinite(found["loss"]):
        raise SanityCheckError(
            f"step 0: the loss is {found['loss']} before any update; look for infinities in the starting weights, "
            "or train in float32 (trainer.plugins.gpu_precision=32)"
        )
    error, allowed = found["step0_error"], TOLERANCE[dtype]
    if error <= allowed:
        return
    raise SanityCheckError(
        f"step 0: policy and reference differ by {error:.2g} nats a token on average (rounding in {dtype} explains "
        f"{allowed:g}), so the loss is {found['preference_loss']:.6f} where {found['step0_loss']:.6f} was due. "
        "A cached reference is stale, or dropout or another layer behaves differently in training: delete the "
        "reference cache if the log names one, and set the model's dropout to 0"
    )


def check_first_gradient(grad_norm: float | None) -> None:
    """The first gradient is finite and not zero.

    Raises:
        GateError: nothing would be learned.
    """
    if grad_norm is None:
        return
    if not math.isfinite(grad_norm):
        raise SanityCheckError(
            f"step 0: the gradient norm is {grad_norm}; look for a bad row, or try trainer.plugins.gpu_precision=32"
        )
    if grad_norm == 0.0:
        raise SanityCheckError(
            "step 0: the gradient is exactly 0, so nothing would be learned; are all weights frozen, "
            "or are both loss weights tiny?"
        )
