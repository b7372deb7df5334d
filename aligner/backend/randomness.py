"""Random numbers as a function of (seed, step, place among the ranks), so that a resumed run draws what it would have.

NeMo saves no random states, and Megatron's belong to one parallel layout. A generator that is seeded anew for each
step needs no state but the step, and nothing that draws beside the training (a validation, a user's callback) moves it.
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

    Ranks that share a tensor-parallel layer draw alike outside it, as Megatron demands, and differently inside; all
    others draw differently (Megatron's own default gives every data-parallel rank the same dropout).
    """
    place = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    # 2^31 keeps room for what Megatron adds for its own streams.
    drawn = int(np.random.SeedSequence([seed, step, *place]).generate_state(1)[0]) >> 1
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
    tensor_parallel.model_parallel_cuda_manual_seed(drawn, te_rng_tracker=te_tracker)


def states() -> str:
    """Hash of this rank's random states."""
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    parts = [random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes()]
    parts += [(name, state.cpu().numpy().tobytes()) for name, state in sorted(tracker.get_states().items())]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_rng_state().numpy().tobytes())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
