"""Reading what a run left, without NeMo."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer, without NeMo."""
    reader = dcp.FileSystemReader(checkpoint / "weights")
    found = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in found.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def read_rows(path: Any) -> list[Any]:
    """The rows of a file, checked as a run checks them."""
    from aligner.data import sources
    from aligner.data.rows import parse_line
    from aligner.data.token_cache import check_rows

    (part,) = sources.resolve_files(str(path), "data.train")
    check_rows(part.path, Path(tempfile.mkdtemp()))
    chunks = sources.chunks(part.path)
    return [row for chunk in chunks for text, source in chunk.texts() for row in parse_line(text, source)]
