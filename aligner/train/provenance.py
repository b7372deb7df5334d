"""Provenance of a run: recipe, code, packages and machine, in a folder for each job of the run."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import yaml
from lightning.pytorch.callbacks import Callback

from aligner.common import secrets_filter, yaml_values
from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.common.run_folder import PROVENANCE, RECIPE, job_files, job_folders, read_job
from aligner.train.arguments import RunArguments
from aligner.train.starting_point import StartingPoint

RECORDED = re.compile(
    r"^(NEMO|NEMORUN|SLURM|CUDA|NCCL|NVTE|TORCH|OMP|GLOO|PYTORCH|HF|WANDB|MASTER|RANK|WORLD|LOCAL)(_|$)"
)


class FilesOfNeMo(Callback):
    """Hides secrets in the command line and the git diff that NeMo writes into a run's folder at the start."""

    NAMES = ("cmd-args.log", "git-info.log")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # NeMo's checkpoint callback writes them in `on_train_start`, as the last callback.
        for file in (self.folder / name for name in self.NAMES if trainer.is_global_zero):
            text = file.read_text(errors="replace") if file.is_file() else ""
            shown = secrets_filter.hidden(text)
            if file.name == self.NAMES[0] and text == " ".join(sys.argv):
                shown = " ".join(secrets_filter.hidden_words(sys.argv))
            if shown != text:
                with atomic_write(file) as partial:
                    partial.write_text(shown)


def write(arguments: RunArguments, start: StartingPoint, settings: dict[str, Any]) -> dict[str, Any]:
    """Record this job in `provenance/job-N/` of the run, and its recipe as the run's `config.yaml`; rank 0 calls.

    `config.yaml` can be run again: `nemo llm align --yaml config.yaml`.

    Returns:
        The recipe as in `config.yaml`; without a recipe, the settings.
    """
    home = arguments.folder / PROVENANCE
    folder = home / f"job-{1 + max(job_folders(arguments.folder), default=0)}"
    folder.mkdir(parents=True)
    recipe, text = _find_recipe(arguments), ""
    if recipe is not None:
        text, as_text, secret = _yaml(recipe)
        if as_text:
            log_rank0(
                f"{RECIPE} cannot be run again, because {', '.join(sorted(as_text))} cannot be written as YAML; give "
                "run.Config or run.Partial of what it is made of"
            )
        if secret:
            log_rank0(f"{RECIPE} can be run again after {', '.join(secret)} is set, which holds a secret and is hidden")
        (folder / RECIPE).write_text(text)
        (arguments.folder / RECIPE).write_text(text)
    commit, difference = git_state()
    if difference:
        (folder / "code.diff").write_text(secrets_filter.hidden(difference))
    (folder / "packages.txt").write_text("\n".join(_packages()) + "\n")
    job = {
        "began": _now(),
        "command": secrets_filter.hidden_words(sys.argv),
        "folder": str(Path.cwd()),
        "machine": {"host": platform.node(), "system": platform.platform(), "python": platform.python_version()},
        "ranks": arguments.trainer.world_size,
        "resumed_from": str(start.resumed or "") or None,
        "initialized_from": str(start.initial or "") or None,
        "git": {
            "commit": commit,
            "changed": bool(difference) or os.environ.get("NEMO_ALIGN_SNAPSHOT", commit) != commit,
        },
        "settings": settings,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if RECORDED.match(name) and not secrets_filter.is_secret_name(name)
        },
    }
    job = secrets_filter.hidden_in(json.loads(json.dumps(job, default=str)))
    (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n")
    return job["settings"] if recipe is None else yaml.safe_load(text)


def end(run: Path, status: str, error: BaseException | None) -> None:
    """Record how the newest job ended: `success`, `preempted`, or `failed` with its error; rank 0 calls."""
    failed = error is not None and status == "failed"
    message = secrets_filter.hidden(f"{type(error).__name__}: {error}") if failed else None
    # A full disk may have ended the job; no exception here may replace its error.
    with contextlib.suppress(OSError, ValueError, IndexError):
        file = job_files(run)[-1]
        job = read_job(file) | {"ended": {"at": _now(), "status": status, "error": message}}
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(job, indent=2) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _find_recipe(arguments: RunArguments) -> run.Partial | None:
    """Find the recipe that this run was built from.

    `align` gets the built objects. Only its caller has the recipe: NeMo-Run's runner or command line, a script, a
    notebook. So the local variables of the callers are searched.
    """
    frame = inspect.currentframe()
    while frame is not None:
        for value in reversed(list(frame.f_locals.values())):
            for recipe in _stages(value):
                if all(
                    _matches(getattr(recipe, part, None), getattr(arguments, part))
                    for part in ("log", "trainer", "data")
                ):
                    return recipe
        frame = frame.f_back
    return None


def _matches(config: Any, part: Any) -> bool:
    """Return whether the config has the plain arguments that the part was built with."""
    built_from: Any = getattr(part, "__io__", None)
    if built_from is None or not isinstance(config, run.Config):
        return False
    plain = {k: v for k, v in built_from.__arguments__.items() if v is None or isinstance(v, str | int | float)}
    return all(getattr(config, name, None) == value for name, value in plain.items())


def _stages(value: Any) -> Iterator[run.Partial]:
    """Yield a recipe and the recipes of its initial stages."""
    while isinstance(value, run.Partial) and getattr(value.__fn_or_cls__, "__name__", "") == "align":
        yield value
        value = getattr(getattr(value, "resume", None), "init_stage", None)


def _yaml(recipe: run.Partial) -> tuple[str, list[str], list[str]]:
    """Return a recipe as YAML, paths of what is text in it and cannot be read back, and what is hidden."""
    from nemo_run.cli.config import ConfigSerializer

    written, as_text = yaml_values.representable(recipe)
    written, secret = yaml_values.without_secrets(written)
    return ConfigSerializer().serialize_yaml(written), as_text, secret


def git_state() -> tuple[str | None, str]:
    """Return the folder's commit and the diff to it: at the time of shipping the job, or else now."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, errors="replace")
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout

    commit, snapshot = os.environ.get("NEMO_ALIGN_COMMIT"), os.environ.get("NEMO_ALIGN_SNAPSHOT")
    commit = commit or (git("rev-parse", "HEAD") or "").strip() or None
    return commit, (git("diff", commit, *([snapshot] if snapshot else [])) or "") if commit else ""


@functools.cache
def _packages() -> list[str]:
    installed = (distribution.metadata for distribution in importlib.metadata.distributions())
    versions = {metadata["Name"]: metadata["Version"] for metadata in installed if metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(versions.items(), key=lambda item: item[0].lower())]
