"""Copy of the trainable weights that can temporarily replace them in the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from nemo.lightning.ckpt_utils import WEIGHTS_PATH
from torch import Tensor

from aligner.common.errors import ConfigError

PREFIX = "reference."
"""Prefix of the copies' names in a checkpoint."""


class WeightCopy:
    """Copies of a Megatron model's trainable parameters; frozen parameters never differ and are shared."""

    def __init__(self, model: Any, *, cpu_offload: bool, dtype: torch.dtype | None) -> None:
        self.model, self.cpu_offload = model, cpu_offload
        self.parameters = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
        self.copies = [self._copy(p, dtype or p.dtype) for p in self.parameters]

    def _copy(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        device = "cpu" if self.cpu_offload else parameter.device
        return parameter.detach().to(device=device, dtype=dtype, copy=True)

    @contextlib.contextmanager
    def use_copy(self) -> Iterator[None]:
        """Run a block with the copies in the model."""
        if self.cpu_offload:
            # In place: the device never has two sets of weights.
            current = [p.detach().to("cpu", copy=True) for p in self.parameters]
            self._fill(self.copies)
            try:
                yield
            finally:
                self._fill(current)
            return
        current = [p.data for p in self.parameters]
        for parameter, stored in zip(self.parameters, self.copies, strict=True):
            parameter.data = stored.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, current, strict=True):
                parameter.data = data

    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)

    @torch.no_grad()
    def ema_update(self, alpha: float) -> None:
        """Update the copies: copy ← α weight + (1 - α) copy."""
        for parameter, stored in zip(self.parameters, self.copies, strict=True):
            stored.lerp_(parameter.detach().to(device=stored.device, dtype=stored.dtype), alpha)

    def _sharded_parameters(self) -> Iterator[tuple[str, Any]]:
        """Yield Megatron's sharded tensors by name; each interleaved stage has its own dictionary."""
        for name, piece in self.model.sharded_state_dict().items():
            if isinstance(piece, dict):
                yield from ((f"{name}.{inner}", part) for inner, part in piece.items())
            else:
                yield name, piece

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def sharded(self) -> dict[str, Any]:
        """Describe the copies as Megatron's sharded tensors, loadable in any parallel layout."""
        indices = {p.data_ptr(): i for i, p in enumerate(self.parameters)}
        pieces: dict[str, Any] = {}
        seen = set()
        for name, piece in self._sharded_parameters():
            data = getattr(piece, "data", None)
            index = indices.get(data.data_ptr()) if isinstance(data, Tensor) else None
            if index is None:
                continue
            seen.add(index)
            renamed = copy.copy(piece)
            renamed.key, renamed.data = PREFIX + piece.key, self.copies[index]
            if hasattr(renamed, "dtype"):
                renamed.dtype = renamed.data.dtype
            pieces[name] = renamed
        if len(seen) < len(self.parameters):
            raise ConfigError(
                f"reference: {len(self.parameters) - len(seen)} weights of this model are saved in pieces that a copy "
                "cannot follow; use run.Config(reference.CachedReference)"
            )
        return pieces

    def load(self, checkpoint: Path) -> None:
        """Load the copies from a checkpoint of the run."""
        pieces = self.sharded()
        copies = {stored.data_ptr(): stored for stored in self.copies}
        targets = {name: copies[piece.data.data_ptr()] for name, piece in pieces.items()}
        loaded: Any = dist_checkpointing.load({"reference": pieces}, str(checkpoint / WEIGHTS_PATH))
        for name, target in targets.items():
            target.copy_(loaded["reference"][name])
