"""NeMo checkpoints on disk: which is whole, which is newest, where a run starts."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from nemo.utils import AppState

from aligner import adapters, huggingface
from aligner.console import say
from aligner.errors import CheckpointError
from aligner.files import written_whole


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint folder was written to its end.

    NeMo puts a marker beside a checkpoint while it writes or removes it; Megatron writes `.metadata` last.
    """
    finished = not ModelCheckpoint.is_checkpoint_unfinished(checkpoint)
    return finished and (checkpoint / WEIGHTS_PATH / ".metadata").is_file()


def step_of(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint, as it says itself; upstream reads them out of folder names."""
    state = torch.load(checkpoint / WEIGHTS_PATH / "common.pt", weights_only=False, map_location="cpu")
    return int(state["global_step"])


def _folders(run: Path) -> list[Path]:
    """Checkpoints of a run, whole or torn."""
    return [path for path in (run / "checkpoints").glob("*") if path.is_dir() and not path.is_symlink()]


def newest(run: Path) -> Path | None:
    """The whole checkpoint of a run with the most steps behind it; torn ones are passed over."""
    folders = _folders(run)
    whole = [path for path in folders if is_whole(path)]
    for torn in sorted(set(folders) - set(whole)):
        say(f"checkpoint {torn} was not written to its end and is passed over")
    return max(whole, key=lambda path: (step_of(path), path.name), default=None)


def ran_out_of_room(run: Path) -> bool:
    """Whether a checkpoint of a run is being written and the disk has less room than a checkpoint takes.

    torch's writer reports a short write as a position in its archive, not as a full disk.
    """
    folders = _folders(run)
    if all(map(is_whole, folders)):
        return False
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders]
    return shutil.disk_usage(run).free < max(sizes)


def require(path: Path, name: str) -> Path:
    """`path` if it is a NeMo 2 checkpoint (its folder, or a run that holds one).

    Raises:
        CheckpointError: it is not.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist; give a NeMo checkpoint or a Hugging Face folder")
    if is_whole(path):
        return path
    inner = newest(path)
    if inner is not None:
        return inner
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"{name}: {path} is not a checkpoint; expected a NeMo folder with {WEIGHTS_PATH}/ and {CONTEXT_PATH}/, "
        f"a run folder with checkpoints/, or a Hugging Face folder with config.json; found {found or 'nothing'}"
    )


class Checkpoint(nl.ModelCheckpoint):
    """NeMo's ModelCheckpoint with three corrections.

    Names carry the steps behind a checkpoint (upstream's are one less); the end of a run is saved wherever the
    interval falls; and `monitor=None, save_top_k=1`, which keeps the newest one, can be resumed.
    """

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}

    def nemo_topk_check_previous_run(self) -> None:
        """What earlier jobs of the run left: upstream looks for the monitored value in folder names."""
        if self.monitor is not None:
            super().nemo_topk_check_previous_run()
            return
        assert self.dirpath is not None
        self.best_model_path = str(newest(Path(self.dirpath).parent) or "")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)


@dataclass(kw_only=True)
class Resume(nl.AutoResume):
    """NeMo's AutoResume, which never starts from a torn checkpoint and knows more places to start from.

    A run goes on from its own newest whole checkpoint. Without one it starts from `restore_config.path`: a NeMo
    checkpoint, a run, a Hugging Face folder or `hf://name` (imported once and kept); or from `start_from`.

    Args:
        start_from: another stage, as a recipe: run if it has not run yet; its newest checkpoint is the start.
    """

    start_from: Optional[Callable[[], Path]] = None
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True

    imported: bool = field(default=False, init=False)
    """Whether `resolve` found a Hugging Face model."""
    adapters: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `resolve` found, if it holds adapters alone; the base they belong to is loaded first."""

    def _find_trainer_ckpt_path(self) -> Path | None:
        return newest(Path(str(AppState().log_dir)))

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
