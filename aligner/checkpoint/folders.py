"""NeMo checkpoints on disk: metadata, corruption, the latest checkpoint of a run."""

import contextlib
import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from aligner.backend import safe_reading
from aligner.checkpoint.safety import integrity
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
            saved_format, step = int(saved["format"]), int(saved["step"])
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
            f"{checkpoint}: was written by nemo-align {_version_in(saved)} in format {saved_format}, "
            f"and this version reads up to {FORMAT}; install that version, or a later one, to go on from step {step}"
        )
    return saved


def _version_in(saved: dict[str, Any]) -> str:
    versions = saved.get("versions")
    return str(versions.get("nemo-align")) if isinstance(versions, dict) else "of another version"


def step_of(checkpoint: Path) -> int:
    """Read the number of optimizer steps from the metadata; NeMo parses folder names."""
    return int(metadata(checkpoint)["step"])


def find_corruption(checkpoint: Path) -> str | None:
    """Describe missing, short or unreadable files of a checkpoint; None if it is complete.

    Bytes that changed are found by `find_damage` of `aligner.checkpoint.safety.integrity`, which reads all of them.
    """
    weights = checkpoint / WEIGHTS_PATH
    if not (weights / ".metadata").is_file():
        # Megatron writes it last.
        return f"{WEIGHTS_PATH}/.metadata is missing"
    missing = integrity.find_missing(checkpoint)
    if missing is not None:
        return missing
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
    return _find_unreadable(checkpoint)


def _find_unreadable(checkpoint: Path) -> str | None:
    """Describe a small file that NeMo opens and that is missing, empty or cut."""
    readers: dict[str, Callable[[Path], Any]] = {
        f"{WEIGHTS_PATH}/common.pt": zipfile.ZipFile,  # its table of contents is its end
        f"{WEIGHTS_PATH}/metadata.json": lambda path: json.loads(path.read_text()),
        f"{CONTEXT_PATH}/io.json": lambda path: json.loads(path.read_text()),
    }
    for name, read in readers.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            read(path)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            return f"{name} cannot be read ({error}; {path.stat().st_size} bytes)"
    return None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is laid out as a NeMo checkpoint, whole or not."""
    return (path / WEIGHTS_PATH).is_dir()


def is_unfinished(checkpoint: Path) -> bool:
    """Return whether the job ended while it wrote or removed this checkpoint."""
    return checkpoint.suffix == PARTIAL or ModelCheckpoint.is_checkpoint_unfinished(checkpoint)


def folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, finished or not; links are followed, and no folder is named twice.

    A folder without any part of a checkpoint is somebody's own and not among them.
    """
    parts = (METADATA_FILE, WEIGHTS_PATH, CONTEXT_PATH)
    found: dict[Path, Path] = {}
    # Folders before links, so that `last` is not taken for another checkpoint.
    for path in sorted((run / "checkpoints").glob("*"), key=lambda path: (path.is_symlink(), path.name)):
        if path.is_dir() and (is_unfinished(path) or any((path / part).exists() for part in parts)):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def latest_checkpoint(run: Path, *, damage: Callable[[Path], str | None] | None = None) -> Path | None:
    """Return the complete checkpoint with the most steps; unfinished and damaged ones are skipped.

    Args:
        damage: describes what else is wrong with a checkpoint that is complete; None: nothing is.

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
            # Of copies with the same step, the run's own comes first.
            step = step_of(path)
            readable.append((step, path.name == f"step={step}", path))
        except (FormatError, UntrustedError):
            raise
        except CheckpointError as error:
            faults[path] = str(error)
    for _, _, path in sorted(readable, reverse=True):
        problem = find_corruption(path) or (damage(path) if damage else None)
        if problem is None:
            for other, why in faults.items():
                _log_skipped(other, f"is damaged ({why})")
            return path
        faults[path] = f"{path}: {problem}"
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


def resolve_checkpoint(path: Path, name: str, *, verify: bool | None = None) -> Path:
    """Resolve a path, of a NeMo 2 checkpoint or of a run that holds one, to the checkpoint.

    Args:
        path: the folder.
        name: the setting that has it, for messages.
        verify: whether to compare all files with their hashes; None: where that is cheap.

    Raises:
        CheckpointError: `path` holds no complete checkpoint, or a file of it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist; give a NeMo checkpoint or a Hugging Face folder")
    if is_checkpoint(path):
        damage = "it was not written to its end" if is_unfinished(path) else find_corruption(path)
        damage = damage or integrity.damage_where_cheap(path, verify)
        if damage is not None:
            raise CheckpointError(f"{name}: {path} is not whole: {damage}; restore it, or give another")
        return path
    latest = latest_checkpoint(path, damage=lambda found: integrity.damage_where_cheap(found, verify))
    if latest is not None:
        return latest
    contents = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"{name}: {path} is not a checkpoint; expected a NeMo folder with {WEIGHTS_PATH}/ and {CONTEXT_PATH}/, "
        f"a run folder with checkpoints/, or a Hugging Face folder with config.json; found {contents or 'nothing'}"
    )
