"""Where a run starts, and whether it resumes from a checkpoint of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from nemo import lightning as nl

from aligner.checkpoint import folders, huggingface
from aligner.common.errors import CheckpointError
from aligner.model import adapters


@dataclass(kw_only=True)
class Resume(nl.AutoResume):
    """NeMo's AutoResume, which never starts from a torn checkpoint and knows more places to start from.

    A run goes on from its own newest whole checkpoint. Without one it starts from `restore_config.path`: a NeMo
    checkpoint, a run, a Hugging Face folder or `hf://name` (imported once and kept); or from `init_stage`.

    Args:
        init_stage: another stage, as a recipe: run if it has not run yet; its newest checkpoint is the start.
        allow_changes: settings that may differ from those the run began with, as ["loss.beta"]; a change of any other
            is refused, with its old and its new value.
    """

    init_stage: Optional[Callable[[], Path]] = None
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
            self.continued = folders.latest_checkpoint(run)
        elif any(not folders.is_unfinished(path) for path in folders.folders(run)):
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
        if self.init_stage is not None:
            start = folders.resolve_checkpoint(Path(self.init_stage()), "resume.init_stage")
            self.restore_config = nl.RestoreConfig(path=str(start))
        if self.restore_config is None:
            return None
        path = str(self.restore_config.path)
        self.imported = huggingface.is_importable(path)
        if self.imported:
            start = huggingface.import_once(path, cache)
        elif path.startswith("nemo://"):
            start = self._extract_path(path)
        else:
            start = folders.resolve_checkpoint(Path(path).expanduser(), "resume.restore_config.path")
        base = adapters.base_of(start)
        if not self.imported and (start / folders.METADATA_FILE).is_file():
            self.imported = bool(folders.metadata(start).get("imported"))
        self.adapters = start if base else None
        # Absolute, since adapters remember the path of their base.
        self.restore_config.path = str((base or start).absolute())
        return start
