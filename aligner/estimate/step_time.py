"""FLOPs and seconds of an optimizer step, by arithmetic.

Time follows from the FLOPs per token and the model FLOPs utilization (MFU): the assumed fraction of a GPU's peak.

Source: Narayanan et al. 2021 (arXiv 2104.04473) for FLOPs and the pipeline bubble.
"""

from __future__ import annotations

from aligner.estimate.memory import GPU, Plan
from aligner.estimate.parameters import ModelShape


def step_flops(model: ModelShape, plan: Plan, *, length: float, epochs: float) -> tuple[float, float]:
    """Return FLOPs per trained token: those that the method requires, and those of recomputation.

    All weights: forward F, backward 2 F. Adapters: the backward pass omits the weight gradients. A reference scored in
    every step adds one forward pass, a cached one F / epochs.

    Args:
        length: mean tokens per sequence.
        epochs: epochs over which a cached reference is amortized.
    """
    forward = model.forward_flops(length)
    attention = forward - 2 * model.num_active_params
    training = 3 * forward if plan.adapter_rank is None else 4 * model.num_active_params + 3 * attention
    reference = {"none": 0.0, "cached": forward / max(epochs, 1)}.get(plan.reference, forward)
    return training + reference, forward if plan.recompute_all else 0.0


def bubble(plan: Plan) -> float:
    """Return the pipeline bubble as a fraction of a step's compute time: (p - 1) / (v m)."""
    return (plan.pipeline - 1) / (plan.virtual * plan.micro_batches)


def step_seconds(model: ModelShape, plan: Plan, gpu: GPU, *, mfu: float, length: float, epochs: float) -> float:
    """Return the seconds of an optimizer step.

    Args:
        mfu: fraction of its peak that a GPU reaches outside the pipeline bubble.
        length: see `step_flops`.
        epochs: see `step_flops`.
    """
    needed, recomputed = step_flops(model, plan, length=length, epochs=epochs)
    tokens = plan.sequences * length
    return tokens * (needed + recomputed) / (plan.ranks * gpu.peak * mfu) * (1 + bubble(plan))
