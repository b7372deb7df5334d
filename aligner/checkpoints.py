"""NeMo checkpoints on disk: which is whole, which is newest, where a run starts."""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import FileSystemReader

from aligner import adapters, huggingface
from aligner.console import say
from aligner.errors import CheckpointError
from aligner.files import PARTIAL, written_whole

RECORD = "align.json"
"""What a checkpoint says of itself, in JSON: step, settings, versions, the value it was kept for."""

FORMAT = 1
"""Raise this when checkpoints change so that older code would misread them."""


class LaterVersion(CheckpointError):
    """A later version of this package wrote a checkpoint; it is not damaged, and must not be passed over."""


def record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; of one that NeMo alone wrote, its step.

    Raises:
        LaterVersion: a later version of this package wrote it.
        CheckpointError: it cannot be read.
    """
    try:
        if (checkpoint / RECORD).is_file():
            found = json.loads((checkpoint / RECORD).read_text())
            written_by, step = found["format"], int(found["step"])
        else:
            state = torch.load(checkpoint / WEIGHTS_PATH / "common.pt", weights_only=False, map_location="cpu")
            return {"step": int(state["global_step"])}
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: what it says of itself cannot be read ({error})") from None
    if written_by > FORMAT:
        raise LaterVersion(
            f"{checkpoint}: was written by nemo-align {found['versions']['nemo-align']} in format {written_by}, "
            f"and this version reads up to {FORMAT}; install that version, or a later one, to go on from step {step}"
        )
    return found


def step_of(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint, as it says itself; upstream reads them out of folder names."""
    return int(record(checkpoint)["step"])


def fault(checkpoint: Path) -> str | None:
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


def newest(run: Path) -> Path | None:
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
        except LaterVersion:
            raise
        except CheckpointError as error:
            faults[path] = str(error)
    for _, path in sorted(found, reverse=True):
        damage = fault(path)
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
    say(f"checkpoint {path} {why} and is passed over")


def ran_out_of_room(run: Path) -> bool:
    """Whether a checkpoint of a run is being written and the disk has less room than a checkpoint takes.

    torch's writer reports a short write as a position in its archive, not as a full disk.
    """
    found = folders(run)
    if not any(map(is_unfinished, found)):
        return False
    return shutil.disk_usage(run).free < max(map(size, found))


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it may be on its way out
            total += file.stat().st_size if file.is_file() else 0
    return total


def written(checkpoint: Path) -> int:
    """When its weights were written, in nanoseconds: a run that was trained further has others under the same name."""
    return (checkpoint / WEIGHTS_PATH / ".metadata").stat().st_mtime_ns


def require(path: Path, name: str) -> Path:
    """`path` if it is a NeMo 2 checkpoint (its folder, or a run that holds one).

    Raises:
        CheckpointError: it is not.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist; give a NeMo checkpoint or a Hugging Face folder")
    if (path / WEIGHTS_PATH).is_dir():
        damage = "it was not written to its end" if is_unfinished(path) else fault(path)
        if damage is not None:
            raise CheckpointError(f"{name}: {path} is not whole: {damage}; restore it, or give another")
        return path
    inner = newest(path)
    if inner is not None:
        return inner
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"{name}: {path} is not a checkpoint; expected a NeMo folder with {WEIGHTS_PATH}/ and {CONTEXT_PATH}/, "
        f"a run folder with checkpoints/, or a Hugging Face folder with config.json; found {found or 'nothing'}"
    )


@dataclass(kw_only=True)
class Resume(nl.AutoResume):
    """NeMo's AutoResume, which never starts from a torn checkpoint and knows more places to start from.

    A run goes on from its own newest whole checkpoint. Without one it starts from `restore_config.path`: a NeMo
    checkpoint, a run, a Hugging Face folder or `hf://name` (imported once and kept); or from `start_from`.

    Args:
        start_from: another stage, as a recipe: run if it has not run yet; its newest checkpoint is the start.
        allow_changes: settings that may differ from those the run began with, as ["loss.beta"]; a change of any other
            is refused, with its old and its new value.
    """

    start_from: Optional[Callable[[], Path]] = None
    allow_changes: list[str] = field(default_factory=list)
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True

    continued: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `find` found."""
    imported: bool = field(default=False, init=False)
    """Whether `resolve` found a Hugging Face model, or a run that came from one."""
    adapters: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `resolve` found, if it holds adapters alone; the base they belong to is loaded first."""

    def find(self, run: Path) -> Path | None:
        """What a run goes on from; None if it begins.

        Raises:
            CheckpointError: see `newest`; or there is something to go on from, and it is not to be.
        """
        if self.resume_if_exists:
            self.continued = newest(run)
        elif any(not is_unfinished(path) for path in folders(run)):
            raise CheckpointError(
                f"resume.resume_if_exists: False, but {run} has checkpoints, which a run that begins anew would take "
                "the place of; choose another log.name, or set it to True to go on"
            )
        return self.continued

    def _find_trainer_ckpt_path(self) -> Path | None:
        return self.continued

    def resolve(self, *, cache: Path) -> Path | None:
        """Find, and if need be make, what a fresh run starts from; None if it starts at random.

        Raises:
            CheckpointError: the place does not hold a model.
        """
        if self.start_from is not None:
            start = require(Path(self.start_from()), "resume.start_from")
            self.restore_config = nl.RestoreConfig(path=str(start))
        if self.restore_config is None:
            return None
        path = str(self.restore_config.path)
        self.imported = huggingface.is_source(path)
        if self.imported:
            start = huggingface.import_once(path, cache)
        elif path.startswith("nemo://"):
            start = self._extract_path(path)
        else:
            start = require(Path(path).expanduser(), "resume.restore_config.path")
        base = adapters.base_of(start)
        if not self.imported and (start / RECORD).is_file():
            self.imported = bool(record(start).get("imported"))
        self.adapters = start if base else None
        # Absolute, since adapters remember the path of their base.
        self.restore_config.path = str((base or start).absolute())
        return start


def tokenizer_of(checkpoint: Path, *, kept_in: Path | None = None) -> Any:
    """The tokenizer that a NeMo checkpoint carries.

    With `kept_in`, its files are copied there first, and will be found after the checkpoint is gone: a run keeps its
    newest checkpoint only, and NeMo writes a tokenizer whose files are gone into the next one as a name to look up.
    """
    from nemo.lightning.io import load_context

    context = checkpoint / CONTEXT_PATH
    if kept_in is not None:
        digest = hashlib.sha256()
        for file in sorted(path for path in context.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(context)} {file.stat().st_size} ".encode() + file.read_bytes())
        kept = kept_in / f"context-{digest.hexdigest()[:8]}"
        if not kept.exists():
            try:
                with written_whole(kept) as partial:
                    shutil.copytree(context, partial)
            except OSError:
                # Another rank was faster; anything else is an error.
                if not kept.exists():
                    raise
        context = kept
    return load_context(context, "model.tokenizer")
