"""Comparison of an imported model with transformers' own: log-probabilities of the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from aligner.backend.device import no_transformer_engine
from aligner.common.errors import CheckpointError

TOKENS = 384
"""Number of compared tokens: random ones, in one sequence."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest mean difference in nats that rounding explains, by the precision of both models' computation."""


@dataclass(frozen=True)
class Comparison:
    """Differences of the log-probabilities of `tokens` tokens, in nats; or why nothing was compared."""

    tokens: int = 0
    precision: str = ""
    mean_difference: float | None = None
    largest_difference: float | None = None
    not_compared: str | None = None

    def __str__(self) -> str:
        if self.not_compared:
            return f"log-probabilities not compared with transformers: {self.not_compared}"
        return (
            f"log-probabilities of {self.tokens} tokens, compared with transformers in {self.precision}: mean "
            f"difference {self.mean_difference:.1e}, largest {self.largest_difference:.1e} nats"
        )

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


@torch.no_grad()
def compare(theirs: Any, ours: Any) -> Comparison:
    """Compare transformers' model with the imported one; both keep their weights and precision.

    In float32 where both models fit into memory in it, otherwise in their own precision.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    stored = next(theirs.parameters()).dtype
    size = sum(parameter.numel() for model in (theirs, ours) for parameter in model.parameters())
    device, precision = torch.device("cpu"), torch.float32
    if not no_transformer_engine():
        # Transformer Engine's layers run on a GPU alone.
        device, precision = torch.device("cuda"), stored
        if torch.cuda.mem_get_info()[0] < 1.2 * size * stored.itemsize:
            return Comparison(not_compared="both models do not fit on a GPU, which Transformer Engine needs")
    elif psutil.virtual_memory().available < 1.2 * size * (4 - stored.itemsize):
        precision = stored
    length = min(TOKENS + 1, theirs.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(theirs.config.vocab_size, (1, length), generator=generator).to(device)
    logps = [_logps(model, tokens, precision) for model in (theirs, ours)]
    difference = (logps[0] - logps[1]).abs()
    found = Comparison(
        tokens=length - 1,
        precision=str(precision).removeprefix("torch."),
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
    )
    if not float(difference.mean()) <= TOLERANCE[precision]:
        raise CheckpointError(
            f"source: the imported model is not the one of transformers: {found}. Please report it; compare=False (in "
            "a run, resume.compare_import=False) imports it all the same"
        )
    return found


def _logps(model: Any, tokens: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Return the log-probability of each token but the first, `[tokens - 1]`."""
    with _moved(model, tokens.device, precision):
        if hasattr(model.config, "model_type"):
            logits = model(input_ids=tokens, use_cache=False).logits
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
            logits = model.module(tokens, positions, None)
        return logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].cpu()


@contextlib.contextmanager
def _moved(model: Any, device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Have a model on a device, its parameters in a precision and its dropout off, within the block."""
    parameters, training = dict(model.named_parameters()), model.training
    before = {name: (parameter.device, parameter.dtype) for name, parameter in parameters.items()}
    home = next(iter(before.values()))[0]
    # Megatron's local softmax rounds its result to the precision that the model is configured for.
    softmaxes = [module for module in model.modules() if hasattr(module, "input_in_float16")]
    rounds = [module.input_in_float16 for module in softmaxes]
    model.eval().to(device)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(precision)
    for module in softmaxes:
        module.input_in_float16 = precision != torch.float32
    try:
        yield
    finally:
        for module, value in zip(softmaxes, rounds, strict=True):
            module.input_in_float16 = value
        model.to(home).train(training)
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(before[name][1])
