"""Zero-centered norms: the weight is the scale minus 1, as in Nemotron; the weight of torch's norms is the scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class CenteredLayerNorm(torch.nn.LayerNorm):
    """Layer norm: (x - mean) / standard deviation · (1 + weight) + bias."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class CenteredRMSNorm(torch.nn.RMSNorm):
    """RMS norm: x / root mean square · (1 + weight)."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, list(self.normalized_shape), 1 + self.weight, self.eps)


def zero_centered_norm(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
    """Create the norm that `config.normalization` names."""
    kind = {"LayerNorm": CenteredLayerNorm, "RMSNorm": CenteredRMSNorm}[config.normalization]
    return kind(hidden_size, eps=eps)
