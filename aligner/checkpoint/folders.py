"""NeMo checkpoints on disk: which is whole, which is newest, where a run starts."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import FileSystemReader

from aligner.common.console import log_rank0
from aligner.common.errors import CheckpointError
from aligner.common.files import PARTIAL

METADATA_FILE = "align.json"
"""What a checkpoint says of itself, in JSON: step, settings, versions, the value it was kept for."""

FORMAT = 2
"""Raise this when checkpoints change so that older code would misread them, or newer code older ones.

2: the classes that a checkpoint names moved into packages."""


class FormatError(CheckpointError):
    """Another version of this package wrote a checkpoint; it is not damaged, and must not be passed over."""


def metadata(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; of one that NeMo alone wrote, its step.

    Raises:
        FormatError: a version with another format wrote it.
        CheckpointError: it cannot be read.
    """
    try:
        if (checkpoint / METADATA_FILE).is_file():
            found = json.loads((checkpoint / METADATA_FILE).read_text())
            written_by, step = found["format"], int(found["step"])
        else:
            state = torch.load(checkpoint / WEIGHTS_PATH / "common.pt", weights_only=False, map_location="cpu")
            return {"step": int(state["global_step"])}
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: what it says of itself cannot be read ({error})") from None
    if written_by < FORMAT:
        raise FormatError(
            f"{checkpoint}: was written in format {written_by}, before the classes that it names moved, and this version "
            f"reads format {FORMAT}; resume it with the version that wrote it, or start anew under another log.name"
        )
    if written_by > FORMAT:
        raise FormatError(
            f"{checkpoint}: was written by nemo-align {found['versions']['nemo-align']} in format {written_by}, "
            f"and this version reads up to {FORMAT}; install that version, or a later one, to go on from step {step}"
        )
    return found


def step_of(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint, as it says itself; upstream reads them out of folder names."""
    return int(metadata(checkpoint)["step"])


def find_corruption(checkpoint: Path) -> str | None:
    """What a checkpoint folder lacks of what was written to it; None if it is whole."""
    weights = checkpoint / WEIGHTS_PATH
    if not (weights / ".metadata").is_file():
        # Megatron writes it last.
        return f"{WEIGHTS_PATH}/.metadata is missing"
    try:
        held: Any = FileSystemReader(weights).read_metadata()
    except Exception as error:
        return f"{WEIGHTS_PATH}/.metadata cannot be read ({type(error).__name__}: {error})"
    ends: dict[str, int] = {}
    for place in held.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = weights / name
        if not file.is_file():
            return f"{WEIGHTS_PATH}/{name} is missing"
        if file.stat().st_size < end:
            return f"{WEIGHTS_PATH}/{name} has {file.stat().st_size} bytes, and {end} were written"
    for name in (f"{WEIGHTS_PATH}/common.pt", f"{CONTEXT_PATH}/io.json"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    return None


def is_unfinished(checkpoint: Path) -> bool:
    """Whether a folder is of a checkpoint that was being written, or removed, when its job ended."""
    return checkpoint.suffix == PARTIAL or ModelCheckpoint.is_checkpoint_unfinished(checkpoint)


def folders(run: Path) -> list[Path]:
    """Checkpoints of a run, finished or not."""
    return [path for path in (run / "checkpoints").glob("*") if path.is_dir() and not path.is_symlink()]


def latest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of a run with the most steps behind it; unfinished and damaged ones are passed over.

    Raises:
        LaterVersion: one of them cannot be read by this version.
        CheckpointError: there are finished ones, and none of them is whole.
    """
    found, faults = [], {}
    for path in sorted(folders(run)):
        if is_unfinished(path):
            _passed_over(path, "was not written to its end")
            continue
        try:
            found.append((step_of(path), path))
        except FormatError:
            raise
        except CheckpointError as error:
            faults[path] = str(error)
    for _, path in sorted(found, reverse=True):
        damage = find_corruption(path)
        if damage is None:
            for other, why in faults.items():
                _passed_over(other, f"is damaged ({why})")
            return path
        faults[path] = f"{path}: {damage}"
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults.values())}. No checkpoint of {run} is whole: restore one from a copy, or start under "
            "another log.name"
        )
    return None


@functools.cache
def _passed_over(path: Path, why: str) -> None:
    """Said once, however often a run looks."""
    log_rank0(f"checkpoint {path} {why} and is passed over")


def disk_usage(folder: Path) -> int:
    """Bytes of all files of a folder."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it may be on its way out
            total += file.stat().st_size if file.is_file() else 0
    return total


def mtime_ns(checkpoint: Path) -> int:
    """When its weights were written, in nanoseconds: a run that was trained further has others under the same name."""
    return (checkpoint / WEIGHTS_PATH / ".metadata").stat().st_mtime_ns


def resolve_checkpoint(path: Path, name: str) -> Path:
    """`path` if it is a NeMo 2 checkpoint (its folder, or a run that holds one).

    Raises:
        CheckpointError: it is not.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist; give a NeMo checkpoint or a Hugging Face folder")
    if (path / WEIGHTS_PATH).is_dir():
        damage = "it was not written to its end" if is_unfinished(path) else find_corruption(path)
        if damage is not None:
            raise CheckpointError(f"{name}: {path} is not whole: {damage}; restore it, or give another")
        return path
    inner = latest_checkpoint(path)
    if inner is not None:
        return inner
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"{name}: {path} is not a checkpoint; expected a NeMo folder with {WEIGHTS_PATH}/ and {CONTEXT_PATH}/, "
        f"a run folder with checkpoints/, or a Hugging Face folder with config.json; found {found or 'nothing'}"
    )
