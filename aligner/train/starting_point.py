"""The checkpoint that a run starts from, or resumes from; model and tokenizer are matched to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.checkpoint import folders, tokenizers
from aligner.checkpoint.resume import Resume
from aligner.common.errors import ConfigError
from aligner.model import adapters, architecture
from aligner.model.reference import BaseModelReference
from aligner.train.arguments import RunArguments


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """At most one of two checkpoints; with none, weights are random."""

    resumed: Path | None
    """The run's own newest checkpoint."""
    initial: Path | None
    """The checkpoint that a fresh run is initialized from."""

    @property
    def checkpoint(self) -> Path | None:
        return self.resumed or self.initial


def find(arguments: RunArguments) -> StartingPoint:
    """Find the checkpoint, import it if need be, and make the model's configuration match it.

    Raises:
        CheckpointError: a checkpoint is damaged, or holds another model.
        ConfigError: `peft` or `reference` contradicts it.
    """
    resume = arguments.resume
    resumed = (resume or Resume(resume_if_exists=False)).find(arguments.folder)
    initial = resume.resolve(cache=arguments.runs / "models") if resume and not resumed else None
    start = StartingPoint(resumed=resumed, initial=initial)
    adapters.check(arguments.peft, start.checkpoint, continued=resumed is not None)
    if start.checkpoint is None:
        return start
    assert resume is not None
    _check_reference(arguments, resume)
    if resumed is not None:
        resume.imported = bool(folders.metadata(resumed).get("imported"))
    update = resume.imported or resumed is not None
    architecture.match_checkpoint(arguments.model, start.checkpoint, update=update)
    size = arguments.strategy.parallelism.tensor_model_parallel_size
    architecture.match_vocab_size(arguments.model, start.checkpoint, tensor_model_parallel_size=size)
    return start


def recorded(arguments: RunArguments, setting: str) -> Any:
    """Return a setting of a run that is resumed, as `data.date`; None if the run is fresh."""
    resumed = arguments.resume.find(arguments.folder) if arguments.resume else None
    return folders.metadata(resumed).get("settings", {}).get(setting) if resumed else None


def _check_reference(arguments: RunArguments, resume: Resume) -> None:
    if resume.adapters and isinstance(arguments.used_reference, BaseModelReference):
        raise ConfigError(
            f"reference: BaseModelReference, but the adapters of {resume.adapters} are continued, so that the policy "
            "would be held to the bare base from before they were trained; use run.Config(CachedReference), or "
            "FrozenReference, which copies adapters alone"
        )


def set_tokenizer(arguments: RunArguments, start: StartingPoint | None) -> None:
    """Give the model the checkpoint's tokenizer if it has none of its own.

    Raises:
        ConfigError: there is neither.
    """
    model = arguments.model
    if model.tokenizer is not None:
        return
    if start is None or start.checkpoint is None:
        raise ConfigError(
            "model.tokenizer: is None and there is no checkpoint to take one from; set it, or "
            "resume.restore_config.path"
        )
    model.tokenizer = tokenizers.load_tokenizer(start.checkpoint, kept_in=arguments.folder if start.resumed else None)
    # For the run's own checkpoints, which contain the model's config.
    model.__io__.tokenizer = model.tokenizer.__io__
