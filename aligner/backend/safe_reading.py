"""Reading of checkpoints, for all of this package: what `loading` says holds as soon as this module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from aligner.backend import loading, patches

patches.apply()


def load_context(context: Path, subpath: str | None = None) -> Any:
    """Build what a checkpoint's `io.json` describes, as `model` or `model.tokenizer`.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    from nemo.lightning.io import load_context as load

    return load(context, subpath)


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
