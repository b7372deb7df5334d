"""Random numbers as a function of (seed, step, rank), identical in resumed and uninterrupted runs.

NeMo saves no random states, and Megatron's states are tied to one parallel layout. Generators reseeded at each step
need no state but the step; draws outside of training (validation, a user's callback) do not affect them.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel


def seed_step(seed: int, step: int, *, te_tracker: bool = False) -> None:
    """Seed every generator for one optimizer step.

    Tensor-parallel ranks draw the same numbers outside of tensor-parallel layers, as Megatron requires, and different
    numbers inside. Other ranks draw different numbers (Megatron's default: equal dropout on all data-parallel ranks).
    """
    ranks = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    # Below 2^31: Megatron adds offsets for its own streams.
    step_seed = int(np.random.SeedSequence([seed, step, *ranks]).generate_state(1)[0]) >> 1
    random.seed(step_seed)
    np.random.seed(step_seed)
    torch.manual_seed(step_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(step_seed, te_rng_tracker=te_tracker)


def states() -> str:
    """Hash this rank's random states."""
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    parts = [random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes()]
    parts += [(name, state.cpu().numpy().tobytes()) for name, state in sorted(tracker.get_states().items())]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_rng_state().numpy().tobytes())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
