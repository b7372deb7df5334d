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
    from aligner.data.forms.form import Options
    from aligner.data.rows import FormatCounts
    from aligner.data.token_cache import check_rows

    (part,) = sources.resolve_files(str(path), "data.train")
    check_rows(part.path, Path(tempfile.mkdtemp()), Options())
    reader = sources.reader_of(part.path, Options())
    return [row for chunk in sources.chunks(part.path) for row in reader.rows(chunk.texts(), FormatCounts())]


def row_of(values: dict[str, Any], source: str = "f.jsonl:1") -> list[Any]:
    """The rows of one line."""
    import json

    from aligner.data.forms.table import recognize
    from aligner.data.rows import FormatCounts

    line = json.dumps(values)
    return list(recognize(line, source).rows([(line, source)], FormatCounts()))
