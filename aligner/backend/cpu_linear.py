"""Linear layers for CPU inference: oneDNN products with weights in oneDNN's packed layout.

A decoding step reads all weights for a few rows. MKL with torch's layout takes about twice as long.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

ROWS = 64
"""Input rows for which oneDNN optimizes the layout."""


def replace_linear(model: torch.nn.Module) -> None:
    """Make all of Megatron's linear layers use oneDNN; weights must not change, and take twice the memory."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            layer: Any = module
            layer._forward_impl = _PackedLinear()


class _PackedLinear:
    """Product x Wᵀ + b; packs the weight at the first call, because a tied weight belongs to another layer."""

    weight: Tensor | None = None

    def __call__(self, *, input: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        assert not kwargs["sequence_parallel"], "a model that answers has whole sequences on every rank"
        if self.weight is not weight:
            self.weight, self.packed_weight = weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed_weight, bias, "none", [], "")
