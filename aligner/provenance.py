"""Where a run comes from: its recipe, code, packages and machine, in a folder for each job that worked on it."""

from __future__ import annotations

import contextlib
import difflib
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
from typing import TYPE_CHECKING, Any

import nemo_run as run
import yaml

from aligner.errors import CheckpointError
from aligner.files import written_whole
from aligner.secrets import SECRET

if TYPE_CHECKING:
    from aligner.engine import Run

FOLDER, RECIPE = "provenance", "config.yaml"
NOTES = "health.jsonl"
"""In `FOLDER`: what was noticed while the run went on, by step."""

TOLD = re.compile(r"^(NEMO|NEMORUN|SLURM|CUDA|NCCL|NVTE|TORCH|OMP|GLOO|PYTORCH|HF|WANDB|MASTER|RANK|WORLD|LOCAL)(_|$)")


def write(work: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Note this job in `provenance/job-N/` of the run, and its recipe as the run's `config.yaml`; rank 0 does.

    Returns:
        The recipe as `config.yaml` has it; without one, the settings.

    `config.yaml` can be run again: `nemo llm align --yaml config.yaml`.
    """
    home = work.folder / FOLDER
    number = 1 + max((int(path.name[4:]) for path in home.glob("job-*")), default=0)
    folder = home / f"job-{number}"
    folder.mkdir(parents=True)
    recipe, text = _recipe(work), ""
    if recipe is not None:
        text = _yaml(recipe)
        (folder / RECIPE).write_text(text)
        (work.folder / RECIPE).write_text(text)
    commit, difference = _code()
    if difference:
        (folder / "code.diff").write_text(difference)
    (folder / "packages.txt").write_text("\n".join(_packages()) + "\n")
    said = {
        "began": _now(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "machine": {"host": platform.node(), "system": platform.platform(), "python": platform.python_version()},
        "ranks": work.trainer.world_size,
        "goes on from": str(work._continued or "") or None,
        "starts from": str(work._start or "") or None,
        "git": {
            "commit": commit,
            "changed": bool(difference) or os.environ.get("NEMO_ALIGN_SNAPSHOT", commit) != commit,
        },
        "settings": settings,
        "environment": {k: v for k, v in sorted(os.environ.items()) if TOLD.match(k) and not SECRET.search(k)},
    }
    (folder / "job.json").write_text(json.dumps(said, indent=2, default=str) + "\n")
    return settings if recipe is None else yaml.safe_load(text)


def jobs(run: Path) -> list[Path]:
    """What each job that worked on a run said of itself, the first one first."""
    return sorted((run / FOLDER).glob("job-*/job.json"), key=lambda path: int(path.parent.name[4:]))


def end(run: Path, status: str, error: BaseException | None) -> None:
    """Note how the newest job ended: `success`, `preempted` or `failed`, then with its error; rank 0 does."""
    told = None if error is None or status != "failed" else f"{type(error).__name__}: {error}"
    # The disk may be what ended it; nothing here may take the place of the error.
    with contextlib.suppress(OSError, ValueError, IndexError):
        file = jobs(run)[-1]
        said = json.loads(file.read_text()) | {"ended": {"at": _now(), "status": status, "error": told}}
        with written_whole(file) as partial:
            partial.write_text(json.dumps(said, indent=2) + "\n")


def note(run: Path, step: int, said: str) -> None:
    """Keep something that was noticed, for the run's page; rank 0 does."""
    # Not worth a run: this is one rank, and the others would wait for it.
    with contextlib.suppress(OSError), (run / FOLDER / NOTES).open("a") as file:
        file.write(json.dumps({"step": step, "said": said}) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def diff(one: str, other: str) -> str:
    """How the recipes of two runs differ, as a unified diff; empty if they do not.

    Args:
        one: a run's folder.
        other: another's.

    Raises:
        CheckpointError: a folder has no recipe.
    """
    lines = []
    for name in (one, other):
        file = Path(name).expanduser() / RECIPE
        if not file.is_file():
            raise CheckpointError(f"{name}: has no {RECIPE}; expected the folder of a run, as runs/tiny_dpo")
        lines.append(file.read_text().splitlines())
    return "\n".join(difflib.unified_diff(lines[0], lines[1], one, other, lineterm="", n=2))


def diff_runs(one: str, other: str) -> None:
    """Print how the recipes of two runs differ.

    Args:
        one: a run's folder.
        other: another's.
    """
    print(diff(one, other) or f"{one} and {other} have the same recipe")


def _recipe(work: Run) -> run.Partial | None:
    """The recipe that this run was built from.

    What is called is what was built; the recipe itself is only known to who built it: NeMo-Run's runner or command
    line, a script, a notebook. So it is looked for there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        for value in reversed(list(frame.f_locals.values())):
            for recipe in _stages(value):
                if all(_made(getattr(recipe, part, None), getattr(work, part)) for part in ("log", "trainer", "data")):
                    return recipe
        frame = frame.f_back
    return None


def _made(config: Any, part: Any) -> bool:
    """Whether a part of a run may have been made from this config: what is plain in it is what the part was given."""
    given: Any = getattr(part, "__io__", None)
    if given is None or not isinstance(config, run.Config):
        return False
    plain = {k: v for k, v in given.__arguments__.items() if v is None or isinstance(v, str | int | float)}
    return all(getattr(config, name, None) == value for name, value in plain.items())


def _stages(value: Any) -> Iterator[run.Partial]:
    """A recipe and those of the stages that it starts from."""
    while isinstance(value, run.Partial) and getattr(value.__fn_or_cls__, "__name__", "") == "align":
        yield value
        value = getattr(getattr(value, "resume", None), "start_from", None)


def _yaml(recipe: run.Partial) -> str:
    from nemo_run.cli.config import ConfigSerializer

    return ConfigSerializer().serialize_yaml(recipe)


def _code() -> tuple[str | None, str]:
    """Commit of the folder's repository, and what differed from it: when the job was shipped, or else now."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, errors="replace")
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout

    commit, snapshot = os.environ.get("NEMO_ALIGN_COMMIT"), os.environ.get("NEMO_ALIGN_SNAPSHOT")
    commit = commit or (git("rev-parse", "HEAD") or "").strip() or None
    return commit, (git("diff", commit, *([snapshot] if snapshot else [])) or "") if commit else ""


def _packages() -> list[str]:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda item: item[0].lower())]
