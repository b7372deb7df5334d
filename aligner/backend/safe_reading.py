"""Reading of checkpoints, for all of this package: what `loading` says holds as soon as this module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from nemo.lightning import io
from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from torch.distributed.checkpoint import FileSystemReader

from aligner.backend import loading, patches

__all__ = ["CONTEXT_PATH", "WEIGHTS_PATH", "load_common", "load_context", "load_values", "read_metadata"]

patches.apply()


def load_context(context: Path, subpath: str | None = None) -> Any:
    """Build what a checkpoint's `io.json` describes, as `model` or `model.tokenizer`.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    return io.load_context(context, subpath)


def load_common(file: Path) -> Any:
    """Load the unsharded state of a checkpoint, `common.pt`.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    return loading.weights_only(lambda: torch.load(file, weights_only=True, map_location="cpu"), str(file))


def read_metadata(weights: Path) -> Any:
    """Read the names, shapes and places of the sharded state of a checkpoint, `.metadata`.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    return FileSystemReader(weights).read_metadata()


def load_values(state: dict[str, Any], weights: Path) -> None:
    """Load values of the sharded state by name into `state`, which holds tensors of their shape, and None.

    Raises:
        UntrustedError: one of them names what no checkpoint has.
    """
    with loading.unwrapped():
        dcp.load(state, storage_reader=FileSystemReader(weights), no_dist=True)
