"""Starting checkpoint of a run: its own latest one, or the source of its initial weights."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from nemo import lightning as nl

from aligner.backend import distributed
from aligner.checkpoint import folders, huggingface
from aligner.checkpoint.safety import integrity
from aligner.checkpoint.safety.ledger import Ledger
from aligner.common.console import log_rank0
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
        verify: compare all files of a checkpoint with their hashes before it is loaded; None: up to 50 GB.
    """

    init_stage: Optional[Callable[[], Path]] = None
    allow_changes: list[str] = field(default_factory=list)
    compare_import: bool = True
    verify: Optional[bool] = None
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True

    continued: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `find` returned."""
    imported: bool = field(default=False, init=False)
    """Whether `resolve` returned an imported Hugging Face model, or a run that started from one."""
    _found: dict[Path, Optional[Path]] = field(default_factory=dict, init=False, repr=False)
    adapters: Optional[Path] = field(default=None, init=False)
    """The checkpoint that `resolve` returned, if it holds adapters alone; their base model is loaded first."""

    def find(self, run: Path) -> Path | None:
        """Return the checkpoint that a run resumes from; None if the run is fresh. Rank 0 looks for it, once.

        Raises:
            CheckpointError: see `folders.latest_checkpoint`; or the run's checkpoints are gone; or checkpoints exist
                and `resume_if_exists` is False.
        """
        if run not in self._found:
            self._found[run] = distributed.of_rank_zero(lambda: self.look(run))
        self.continued = self._found[run]
        return self.continued

    def look(self, run: Path) -> Path | None:
        """Look for the checkpoint now, without another rank; see `find`."""
        if not self.resume_if_exists:
            if any(not folders.is_unfinished(path) for path in folders.folders(run)):
                raise CheckpointError(
                    f"resume.resume_if_exists: False, but {run} has checkpoints, which a run that begins anew would "
                    "take the place of; choose another log.name, or set it to True to go on"
                )
            return None
        found = folders.latest_checkpoint(run, damage=lambda path: integrity.damage_where_cheap(path, self.verify))
        _check_gone(run, found)
        return found

    def _find_trainer_ckpt_path(self) -> Path | None:
        return self.continued

    def resolve(self, *, cache: Path) -> Path | None:
        """Find, import or train the checkpoint that a fresh run starts from; None for random weights.

        Raises:
            CheckpointError: the path holds no model.
        """
        if self.init_stage is not None:
            start = self._resolve(Path(self.init_stage()), "resume.init_stage")
            self.restore_config = nl.RestoreConfig(path=str(start))
        if self.restore_config is None:
            return None
        path = str(self.restore_config.path)
        self.imported = huggingface.is_importable(path)
        if self.imported:
            imported = huggingface.import_once(path, cache, compare=self.compare_import)
            start = self._resolve(imported, "resume.restore_config.path")
        elif path.startswith("nemo://"):
            start = self._extract_path(path)
        else:
            start = self._resolve(Path(path).expanduser(), "resume.restore_config.path")
        base = adapters.base_of(start)
        if not self.imported and (start / folders.METADATA_FILE).is_file():
            self.imported = bool(folders.metadata(start).get("imported"))
        self.adapters = start if base else None
        # Absolute, because adapters store the path of their base.
        self.restore_config.path = str((base or start).absolute())
        return start

    def _resolve(self, path: Path, name: str) -> Path:
        return distributed.of_rank_zero(lambda: folders.resolve_checkpoint(path, name, verify=self.verify))


def _check_gone(run: Path, found: Path | None) -> None:
    """Compare the checkpoints that a run wrote with the one that was found.

    Raises:
        CheckpointError: all that the run wrote are gone, so that it would begin anew.
    """
    written = {int(name[5:]): name for name in Ledger(run).named("complete") if re.fullmatch(r"step=\d+", name)}
    at = folders.step_of(found) if found else -1
    newer = [run / "checkpoints" / name for step, name in sorted(written.items()) if step > at]
    gone = [path for path in newer if not path.exists()]  # one that is there is damaged, which has been told
    if not gone:
        return
    where = ", ".join(map(str, gone))
    if found is None:
        raise CheckpointError(
            f"log.name: {where}, which this run wrote, is gone, so that it would begin anew; put it back, or a link to "
            "where it is now, or choose another log.name"
        )
    log_rank0(f"{where}, which this run wrote, is gone; it goes on from {found.name}")
