"""Bitwise comparison of two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from aligner.backend import safe_reading
from aligner.backend.safe_reading import WEIGHTS_PATH

COMMON = ("global_step", "optimizer", "lr_schedulers", "AlignDataModule")
"""Keys of the unsharded state (`common.pt`) that must be equal; the others are loop counters and paths."""


def read(checkpoint: Path) -> dict[str, Any]:
    """Load all values of a checkpoint by name: weights, optimizer, reference, schedule, data."""
    state: dict[str, Any] = {}
    for name, meta in safe_reading.read_metadata(checkpoint / WEIGHTS_PATH).state_dict_metadata.items():
        if not isinstance(meta, BytesStorageMetadata):
            state[name] = torch.empty(meta.size, dtype=meta.properties.dtype)
        else:
            state[name] = None
    safe_reading.load_values(state, checkpoint / WEIGHTS_PATH)
    # Megatron's own objects (Transformer Engine's extra states) are lists of tensors.
    for name in [name for name, value in state.items() if not isinstance(value, Tensor)]:
        _flatten(name, state.pop(name), state)
    common = safe_reading.load_common(checkpoint / WEIGHTS_PATH / "common.pt")
    for name in COMMON:
        _flatten(name, common.get(name), state)
    return state


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{name}.{key}", part, into)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _flatten(f"{name}[{i}]", part, into)
    else:
        into[name] = value


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Describe the first difference between two checkpoints; None if they are identical."""
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            return f"{name} is only in the {'second' if name not in one else 'first'}"
        a, b = one[name], other[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            if not torch.equal(a, b):
                differ = a != b
                index = tuple(int(i) for i in differ.nonzero()[0])
                largest = float((a.double() - b.double()).abs().max())
                count = f"{int(differ.sum())} of {a.numel()} elements, largest distance {largest:.3g}"
                return f"{name}{list(index)}: {a[index].item()!r} and {b[index].item()!r} ({count})"
        elif type(a) is not type(b) or a != b:
            return f"{name}: {a!r} and {b!r}"
    return None
