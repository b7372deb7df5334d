"""A run in Weights & Biases: one and the same run there, however many jobs work on it here."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.console import say
from aligner.errors import REQUEUE
from aligner.files import written_whole
from aligner.round_report import log_round

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

ID = Path("provenance/wandb_id")
"""Of a run's folder: by which name W&B knows it."""


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
        file = folder / ID
        known = file.read_text().strip() if file.is_file() else None
        logger._id = settings["id"] = known or secrets.token_hex(4)
    if write:
        (folder / ID).parent.mkdir(exist_ok=True)
        with written_whole(folder / ID) as partial:
            partial.write_text(settings["id"] + "\n")
    settings["resume"] = "allow"


def describe(logger: WandbLogger, recipe: dict[str, Any], *, train: Any, fresh: bool) -> None:
    """The recipe as the run's config; and of a fresh run the round that made its rows, if one did."""
    logger.experiment.config.update(recipe, allow_val_change=True)
    if fresh:
        log_round(logger, train)


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
        say(f"Weights & Biases: {type(error).__name__}: {error}")


def _end(started: Any, status: str) -> None:
    started.finish(exit_code={"success": 0, "preempted": REQUEUE}.get(status, 1))


def log_samples(folder: Path, recipe: dict[str, Any], columns: list[str], rows: list[Any]) -> bool:
    """A table of answers in the W&B run of a folder; False if it has none."""
    settings = recipe.get("log", {}).get("wandb") or {}
    if not (folder / ID).is_file():
        return False
    import wandb

    held = {name: settings[name] for name in ("project", "entity") if settings.get(name)}
    mode: Any = "offline" if settings.get("offline") else "online"
    run = wandb.init(id=(folder / ID).read_text().strip(), resume="allow", dir=str(folder), mode=mode, **held)
    run.log({"samples": wandb.Table(columns=list[Any](columns), data=rows)})
    run.finish()
    return True
