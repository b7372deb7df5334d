"""FLOPs and seconds of an optimizer step, by arithmetic.

Time follows from the FLOPs of a token and the share of its peak that a GPU is taken to reach (MFU).

Source: Narayanan et al. 2021 (arXiv 2104.04473) for FLOPs and the pipeline's bubble.
"""

from __future__ import annotations

from aligner.estimate.memory import GPU, Plan
from aligner.estimate.parameters import ModelShape


def step_flops(model: ModelShape, plan: Plan, *, length: float, epochs: float) -> tuple[float, float]:
    """FLOPs of a token that is trained on: what the method needs, and what is made besides it by recomputing.

    All weights: forward F, backward 2 F. Adapters: the backward pass leaves out the weights' gradients. A live
    reference is one forward pass more, a cached one F / epochs.

    Args:
        length: tokens of a sequence on average.
        epochs: over which a cached reference is spread.
    """
    forward = model.forward_flops(length)
    attention = forward - 2 * model.num_active_params
    learning = 3 * forward if plan.adapter_rank is None else 4 * model.num_active_params + 3 * attention
    reference = {"none": 0.0, "cached": forward / max(epochs, 1)}.get(plan.reference, forward)
    return learning + reference, forward if plan.recompute_all else 0.0


def bubble(plan: Plan) -> float:
    """Share of a step that pipeline stages wait, on top of their work: (p - 1) / (v m)."""
    return (plan.pipeline - 1) / (plan.virtual * plan.micro_batches)


def step_seconds(model: ModelShape, plan: Plan, gpu: GPU, *, mfu: float, length: float, epochs: float) -> float:
    """Seconds of an optimizer step.

    Args:
        mfu: share of its peak that a GPU reaches while it is not waiting for a pipeline.
        length: see `step_flops`.
        epochs: likewise.
    """
    needed, again = step_flops(model, plan, length=length, epochs=epochs)
    tokens = plan.sequences * length
    return tokens * (needed + again) / (plan.ranks * gpu.peak * mfu) * (1 + bubble(plan))
