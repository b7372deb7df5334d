"""Matrix products of a model that only answers, on a CPU: by oneDNN, in the layout that it reads fastest.

A step of decoding reads all weights for a few rows. From torch's layout, by MKL, that takes about twice as long.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

ROWS = 64
"""Of the input, that the layout is chosen for."""


def replace_linear(model: torch.nn.Module) -> None:
    """Have all linear layers of Megatron's multiply so; the weights must stay what they are, and are held twice."""
    for layer in model.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            own: Any = layer
            own._forward_impl = _Product()


class _Product:
    """x Wᵀ + b, of a weight that is laid out when it is first seen: a tied one belongs to another layer."""

    weight: Tensor | None = None

    def __call__(self, *, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
        assert not settings["sequence_parallel"], "a model that answers has whole sequences on every rank"
        if self.weight is not weight:
            self.weight, self.laid_out = weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        return torch.ops.mkldnn._linear_pointwise(input, self.laid_out, bias, "none", [], "")
