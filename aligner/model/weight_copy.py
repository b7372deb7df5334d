"""A second set of the weights that are trained, which can take the first one's place for a while."""

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
"""Before the names of weights in a checkpoint."""


class WeightCopy:
    """Copies of a Megatron model's trained parameters; frozen ones never differ, so they are shared."""

    def __init__(self, model: Any, *, cpu_offload: bool, dtype: torch.dtype | None) -> None:
        self.model, self.cpu_offload = model, cpu_offload
        self.parameters = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
        self.copies = [self._copy(p, dtype or p.dtype) for p in self.parameters]

    def _copy(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        device = "cpu" if self.cpu_offload else parameter.device
        return parameter.detach().to(device=device, dtype=dtype, copy=True)

    @contextlib.contextmanager
    def use_copy(self) -> Iterator[None]:
        """Within this, the model computes with the copies."""
        if self.cpu_offload:
            # In place, so that the device never holds two sets.
            live = [p.detach().to("cpu", copy=True) for p in self.parameters]
            self._fill(self.copies)
            try:
                yield
            finally:
                self._fill(live)
            return
        live = [p.data for p in self.parameters]
        for parameter, held in zip(self.parameters, self.copies, strict=True):
            parameter.data = held.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, live, strict=True):
                parameter.data = data

    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)

    @torch.no_grad()
    def ema_update(self, alpha: float) -> None:
        """copy ← α weight + (1 - α) copy."""
        for parameter, held in zip(self.parameters, self.copies, strict=True):
            held.lerp_(parameter.detach().to(device=held.device, dtype=held.dtype), alpha)

    def _pieces(self) -> Iterator[tuple[str, Any]]:
        """Megatron's description of the weights; interleaved stages have a dictionary each."""
        for name, piece in self.model.sharded_state_dict().items():
            if isinstance(piece, dict):
                yield from ((f"{name}.{inner}", part) for inner, part in piece.items())
            else:
                yield name, piece

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def sharded(self) -> dict[str, Any]:
        """The copies as Megatron saves weights, which any parallel layout can load again."""
        places = {p.data_ptr(): i for i, p in enumerate(self.parameters)}
        found: dict[str, Any] = {}
        seen = set()
        for name, piece in self._pieces():
            data = getattr(piece, "data", None)
            index = places.get(data.data_ptr()) if isinstance(data, Tensor) else None
            if index is None:
                continue
            seen.add(index)
            moved = copy.copy(piece)
            moved.key, moved.data = PREFIX + piece.key, self.copies[index]
            if hasattr(moved, "dtype"):
                moved.dtype = moved.data.dtype
            found[name] = moved
        if len(seen) < len(self.parameters):
            raise ConfigError(
                f"reference: {len(self.parameters) - len(seen)} weights of this model are saved in pieces that a copy "
                "cannot follow; use run.Config(reference.CachedReference)"
            )
        return found

    def load(self, checkpoint: Path) -> None:
        """Take the copies from a checkpoint of the run."""
        pieces = self.sharded()
        places = {held.data_ptr(): held for held in self.copies}
        targets = {name: places[piece.data.data_ptr()] for name, piece in pieces.items()}
        loaded: Any = dist_checkpointing.load({"reference": pieces}, str(checkpoint / WEIGHTS_PATH))
        for name, target in targets.items():
            target.copy_(loaded["reference"][name])
