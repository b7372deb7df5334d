"""A run in Weights & Biases: one and the same run there, however many jobs work on it here."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.common.console import log_rank0
from aligner.common.errors import REQUEUE
from aligner.common.files import atomic_write
from aligner.common.run_folder import PROVENANCE, WANDB_ID

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger


def place(logger: WandbLogger, folder: Path, *, write: bool) -> None:
    """Have W&B write into the run's own folder, and go on in the run that an earlier job began.

    Without NeMo's own handling, which would make a folder and a run of W&B for each job.

    Args:
        logger: of the recipe; an id that it sets itself is kept.
        folder: the run's.
        write: whether this process notes the id; one rank does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = logger._wandb_init
    logger._save_dir = settings["dir"] = str(folder)
    if settings.get("id") is None:
        file = _id_file(folder)
        known = file.read_text().strip() if file.is_file() else None
        logger._id = settings["id"] = known or secrets.token_hex(4)
    if write:
        _id_file(folder).parent.mkdir(exist_ok=True)
        with atomic_write(_id_file(folder)) as partial:
            partial.write_text(settings["id"] + "\n")
    settings["resume"] = "allow"


def describe(logger: WandbLogger, recipe: dict[str, Any]) -> None:
    """Log the recipe as the W&B run's config."""
    logger.experiment.config.update(recipe, allow_val_change=True)


def finish(logger: WandbLogger | None, status: str, *, page: Path | None) -> None:
    """End this job's part of the run there, with its page."""
    started: Any = getattr(logger, "_experiment", None)
    if started is None:
        return
    import wandb

    try:
        if page is not None:
            started.log({"report": wandb.Html(page.read_text(), inject=False)})
        _end(started, status)
    except Exception as error:  # W&B may fail in any way, and must not change how the run ended.
        log_rank0(f"Weights & Biases: {type(error).__name__}: {error}")


def _end(started: Any, status: str) -> None:
    started.finish(exit_code={"success": 0, "preempted": REQUEUE}.get(status, 1))


def _id_file(folder: Path) -> Path:
    return folder / PROVENANCE / WANDB_ID
