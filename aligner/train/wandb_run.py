"""Weights & Biases: one W&B run for all jobs of a run."""

from __future__ import annotations

import inspect
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.common import network, secrets_filter
from aligner.common.console import log_rank0
from aligner.common.errors import REQUEUE, ConfigError
from aligner.common.files import atomic_write
from aligner.common.run_folder import PROVENANCE, WANDB_ID
from aligner.train import provenance

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger


def check(logger: WandbLogger) -> None:
    """Check that W&B can be logged to, before anything is trained.

    Raises:
        ConfigError: there is no key, or no way to the server.
    """
    # `wandb.setup` fixes the mode of the process, so it is not called for a run that writes to a folder.
    mode = str(logger._wandb_init.get("mode") or os.environ.get("WANDB_MODE") or "online")
    if logger._offline or mode not in ("online", "run", "shared"):
        return
    import wandb

    try:
        _check_server(wandb.setup().settings)
    finally:
        wandb.teardown()  # a later run of this process may write to a folder


def _check_server(settings: Any) -> None:
    """Check key and network."""
    offline = "log.wandb.offline=True writes to the run's folder, and `wandb sync` uploads it later"
    if not _has_key(settings):
        raise ConfigError(f"log.wandb: there is no API key; run `wandb login`, or set WANDB_API_KEY; {offline}")
    try:
        network.check_reachable(settings.base_url)
    except OSError as error:
        raise ConfigError(f"log.wandb: {settings.base_url} cannot be reached ({error}); {offline}") from None


def _has_key(settings: Any) -> bool:
    """Return whether W&B finds a key, without asking for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or getattr(settings, "api_key", None):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:  # of newer versions
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)


def place(logger: WandbLogger, folder: Path, *, write: bool) -> None:
    """Write W&B's files into the run's folder, and resume the W&B run of earlier jobs.

    This replaces NeMo's handling, which would create a folder and a W&B run for each job.

    Args:
        logger: logger of the recipe; an id that the recipe sets is kept.
        folder: folder of the run.
        write: whether this process stores the id; one rank does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = logger._wandb_init
    logger._save_dir = settings["dir"] = str(folder)
    if settings.get("id") is None:
        file = _id_file(folder)
        stored = file.read_text().strip() if file.is_file() else None
        logger._id = settings["id"] = stored or secrets.token_hex(4)
    if write:
        _id_file(folder).parent.mkdir(exist_ok=True)
        with atomic_write(_id_file(folder)) as partial:
            partial.write_text(settings["id"] + "\n")
        if _shows_secrets():
            import wandb

            given = settings.get("settings")
            given = given if isinstance(given, wandb.Settings) else wandb.Settings(**(given or {}))
            given.x_disable_meta = given.disable_git = True
            settings["settings"] = given
            log_rank0("log.wandb: gets neither command line nor code, which have secrets in them")
    settings["resume"] = "allow"


def _shows_secrets() -> bool:
    """Return whether the command line or uncommitted code, which W&B uploads by itself, has a secret."""
    code = provenance.git_state()[1]
    return secrets_filter.hidden_words(sys.argv) != sys.argv or secrets_filter.hidden(code) != code


def describe(logger: WandbLogger, recipe: dict[str, Any]) -> None:
    """Log the recipe as the W&B run's config, without its secrets."""
    logger.experiment.config.update(secrets_filter.hidden_in(recipe), allow_val_change=True)


def finish(logger: WandbLogger | None, status: str, *, page: Path | None) -> None:
    """End this job's part of the W&B run, with its page."""
    experiment: Any = getattr(logger, "_experiment", None)
    if experiment is None:
        return
    import wandb

    try:
        if page is not None:
            experiment.log({"report": wandb.Html(page.read_text(), inject=False)})
        _end(experiment, status)
    except Exception as error:  # no failure of W&B may change how the run ended
        log_rank0(f"Weights & Biases: {type(error).__name__}: {error}")


def _end(experiment: Any, status: str) -> None:
    experiment.finish(exit_code={"success": 0, "preempted": REQUEUE}.get(status, 1))


def _id_file(folder: Path) -> Path:
    return folder / PROVENANCE / WANDB_ID
