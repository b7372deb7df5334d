"""NeMo checkpoints on disk: metadata, corruption, the latest checkpoint of a run."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from aligner.backend import safe_reading
from aligner.common.console import log_rank0
from aligner.common.errors import CheckpointError, UntrustedError
from aligner.common.files import PARTIAL

METADATA_FILE = "align.json"
"""Checkpoint metadata in JSON: step, settings, versions, monitored value."""

FORMAT = 2
"""Format of checkpoints. Raise it when older code would misread new checkpoints, or newer code old ones.

2: the classes that a checkpoint names moved into packages."""


class FormatError(CheckpointError):
    """A checkpoint has another format. It is not damaged and must not be skipped."""


def metadata(checkpoint: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint; its step alone if plain NeMo wrote it.

    Raises:
        FormatError: the checkpoint has another format.
        CheckpointError: the metadata cannot be read.
    """
    try:
        if (checkpoint / METADATA_FILE).is_file():
            saved = json.loads((checkpoint / METADATA_FILE).read_text())
            saved_format, step = saved["format"], int(saved["step"])
        else:
            state = safe_reading.load_common(checkpoint / WEIGHTS_PATH / "common.pt")
            return {"step": int(state["global_step"])}
    except UntrustedError:
        raise
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: what it says of itself cannot be read ({error})") from None
    if saved_format < FORMAT:
        raise FormatError(
            f"{checkpoint}: was written in format {saved_format}, before the classes that it names moved, and this "
            f"version reads format {FORMAT}; resume it with the version that wrote it, or start anew under another "
            "log.name"
        )
    if saved_format > FORMAT:
        raise FormatError(
            f"{checkpoint}: was written by nemo-align {saved['versions']['nemo-align']} in format {saved_format}, "
            f"and this version reads up to {FORMAT}; install that version, or a later one, to go on from step {step}"
        )
    return saved


def step_of(checkpoint: Path) -> int:
    """Read the number of optimizer steps from the metadata; NeMo parses folder names."""
    return int(metadata(checkpoint)["step"])


def find_corruption(checkpoint: Path) -> str | None:
    """Describe missing or short files of a checkpoint; None if it is complete."""
    weights = checkpoint / WEIGHTS_PATH
    if not (weights / ".metadata").is_file():
        # Megatron writes it last.
        return f"{WEIGHTS_PATH}/.metadata is missing"
    try:
        torch_metadata: Any = safe_reading.read_metadata(weights)
    except UntrustedError:
        raise
    except Exception as error:
        return f"{WEIGHTS_PATH}/.metadata cannot be read ({type(error).__name__}: {error})"
    ends: dict[str, int] = {}
    for info in torch_metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
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
    """Return whether the job ended while it wrote or removed this checkpoint."""
    return checkpoint.suffix == PARTIAL or ModelCheckpoint.is_checkpoint_unfinished(checkpoint)


def folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, finished or not."""
    return [path for path in (run / "checkpoints").glob("*") if path.is_dir() and not path.is_symlink()]


def latest_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint with the most steps; unfinished and damaged ones are skipped.

    Raises:
        FormatError: a checkpoint has another format.
        CheckpointError: every finished checkpoint is damaged.
    """
    readable, faults = [], {}
    for path in sorted(folders(run)):
        if is_unfinished(path):
            _log_skipped(path, "was not written to its end")
            continue
        try:
            readable.append((step_of(path), path))
        except (FormatError, UntrustedError):
            raise
        except CheckpointError as error:
            faults[path] = str(error)
    for _, path in sorted(readable, reverse=True):
        damage = find_corruption(path)
        if damage is None:
            for other, why in faults.items():
                _log_skipped(other, f"is damaged ({why})")
            return path
        faults[path] = f"{path}: {damage}"
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults.values())}. No checkpoint of {run} is whole: restore one from a copy, or start under "
            "another log.name"
        )
    return None


@functools.cache
def _log_skipped(path: Path, why: str) -> None:
    """Log a skipped checkpoint, once per process."""
    log_rank0(f"checkpoint {path} {why} and is passed over")


def disk_usage(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a file may be removed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def mtime_ns(checkpoint: Path) -> int:
    """Return the time of writing in nanoseconds: a run trained further has other weights under the same name."""
    return (checkpoint / WEIGHTS_PATH / ".metadata").stat().st_mtime_ns


def resolve_checkpoint(path: Path, name: str) -> Path:
    """Resolve a path, of a NeMo 2 checkpoint or of a run that holds one, to the checkpoint.

    Raises:
        CheckpointError: `path` holds no complete checkpoint.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist; give a NeMo checkpoint or a Hugging Face folder")
    if (path / WEIGHTS_PATH).is_dir():
        damage = "it was not written to its end" if is_unfinished(path) else find_corruption(path)
        if damage is not None:
            raise CheckpointError(f"{name}: {path} is not whole: {damage}; restore it, or give another")
        return path
    latest = latest_checkpoint(path)
    if latest is not None:
        return latest
    contents = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"{name}: {path} is not a checkpoint; expected a NeMo folder with {WEIGHTS_PATH}/ and {CONTEXT_PATH}/, "
        f"a run folder with checkpoints/, or a Hugging Face folder with config.json; found {contents or 'nothing'}"
    )
