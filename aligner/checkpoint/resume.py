"""Starting checkpoint of a run: its own latest one, or the source of its initial weights."""

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
    """NeMo's AutoResume that never loads an incomplete checkpoint and has more sources of initial weights.

    A run resumes from its own latest complete checkpoint. Without one it starts from `restore_config.path`: a NeMo
    checkpoint, a run, a Hugging Face folder or `hf://name` (imported once and kept); or from `init_stage`.

    Args:
        init_stage: recipe of an earlier stage. It runs unless it has run already; its latest checkpoint is the start.
        allow_changes: settings that may differ from those of earlier jobs, as ["loss.beta"]. A change of any other
            setting is refused, with its old and new value.
        compare_import: compare log-probabilities of an imported model with transformers' (`import-hf`).
    """

    init_stage: Optional[Callable[[], Path]] = None
    allow_changes: list[str] = field(default_factory=list)
    compare_import: bool = True
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True

    continued: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `find` returned."""
    imported: bool = field(default=False, init=False)
    """Whether `resolve` returned an imported Hugging Face model, or a run that started from one."""
    adapters: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `resolve` returned, if it holds adapters alone; their base model is loaded first."""

    def find(self, run: Path) -> Path | None:
        """Return the checkpoint that a run resumes from; None if the run is fresh.

        Raises:
            CheckpointError: see `folders.latest_checkpoint`; or checkpoints exist and `resume_if_exists` is False.
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
        """Find, import or train the checkpoint that a fresh run starts from; None for random weights.

        Raises:
            CheckpointError: the path holds no model.
        """
        if self.init_stage is not None:
            start = folders.resolve_checkpoint(Path(self.init_stage()), "resume.init_stage")
            self.restore_config = nl.RestoreConfig(path=str(start))
        if self.restore_config is None:
            return None
        path = str(self.restore_config.path)
        self.imported = huggingface.is_importable(path)
        if self.imported:
            start = huggingface.import_once(path, cache, compare=self.compare_import)
        elif path.startswith("nemo://"):
            start = self._extract_path(path)
        else:
            start = folders.resolve_checkpoint(Path(path).expanduser(), "resume.restore_config.path")
        base = adapters.base_of(start)
        if not self.imported and (start / folders.METADATA_FILE).is_file():
            self.imported = bool(folders.metadata(start).get("imported"))
        self.adapters = start if base else None
        # Absolute, because adapters store the path of their base.
        self.restore_config.path = str((base or start).absolute())
        return start
