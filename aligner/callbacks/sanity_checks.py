"""Checks of a run's first step against theory: a wrong set-up costs minutes instead of days."""

from __future__ import annotations

import math

import torch

from aligner.common.errors import SanityCheckError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Nats per token by which policy and reference may differ at step 0. In float32, rounding depends on the shape of the
batch; half precision rounds every activation."""


def check_policy_matches_reference(found: dict[str, float], dtype: torch.dtype) -> None:
    """Check that the loss has its known constant (ln 2 for DPO): at step 0 policy equals reference, and rewards are 0.

    Raises:
        SanityCheckError: policy and reference differ, or the loss is not finite.
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
    """Check that the first gradient is finite and not zero.

    Raises:
        SanityCheckError: the gradient norm is 0 or not finite.
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
