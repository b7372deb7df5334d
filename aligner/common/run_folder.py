"""Names and readers of the files in a run's folder."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from pathlib import Path
from typing import Any

from aligner.common.errors import ConfigError

METRICS = "metrics.csv"
"""Metrics: one line per step, one column per metric."""
RECIPE = "config.yaml"
"""Recipe; `nemo llm align --yaml config.yaml` runs it again."""
SAMPLES = "samples.jsonl"
"""Sample responses: one line per prompt with `prompt`, `before`, `after`."""
PAGE = "report.html"
"""Page of a run, made at its end."""
FILES = (METRICS, RECIPE, SAMPLES, PAGE)
PROVENANCE = "provenance"
"""Folder with one subfolder per job: recipe, code, packages, machine."""
NOTES = "notes.jsonl"
"""File in `PROVENANCE`: observations during training, by step."""
WANDB_ID = "wandb_id"
"""File in `PROVENANCE`: id of the run in Weights & Biases."""


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the lines of a run's `metrics.csv`, without empty fields.

    A missing file gives no lines. A line truncated by a full disk is skipped.
    """
    if not Path(path).exists():
        return []
    lines = []
    with Path(path).open(newline="", errors="replace") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            with contextlib.suppress(ValueError, TypeError):
                values = {k: float(v) for k, v in row.items() if v}
                if "step" in values:
                    lines.append(values)
    return lines


def check_own(run: Path) -> None:
    """Check that the files which a job will write over are a run's: a folder may hold other files of its owner.

    Raises:
        ConfigError: there is such a file, and no job of a run was here.
    """
    if job_folders(run):
        return
    foreign = [name for name in FILES if (run / name).exists() or (run / name).is_symlink()]
    # A job that a kill ended early has left a folder of this name.
    foreign += [PROVENANCE] if (run / PROVENANCE).is_file() else []
    if foreign:
        raise ConfigError(
            f"log.name: {run} has {', '.join(foreign)}, which no run wrote, and a run would write over; move what is "
            "there, or choose another log.name"
        )


def job_folders(run: Path) -> dict[int, Path]:
    """Return the folder of each job of a run by its number, in the order of the jobs; other names are not looked at."""
    found = {path: re.fullmatch(r"job-(\d+)", path.name) for path in (run / PROVENANCE).glob("job-*") if path.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def job_files(run: Path) -> list[Path]:
    """List the `job.json` of each job of a run, in the order of the jobs."""
    return [path / "job.json" for path in job_folders(run).values() if (path / "job.json").is_file()]


def read_job(file: Path) -> dict[str, Any]:
    """Read a `job.json`; empty if it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        job = json.loads(file.read_text(errors="replace"))
        return job if isinstance(job, dict) else {}
    return {}


def ending(run: Path) -> str | None:
    """Return how the newest job of a run ended by its own record: `success`, `preempted`, `failed` or `stopped`.

    `stopped` is a job that recorded no end; None: there is no record here.
    """
    files = job_files(run)
    ended = read_job(files[-1]).get("ended") if files else None
    return (ended.get("status", "stopped") if isinstance(ended, dict) else "stopped") if files else None


def add_note(run: Path, step: int, text: str) -> None:
    """Append an observation for the run's report; only rank 0 calls it."""
    # A failed write must not stop the run: the other ranks would wait for this rank.
    with contextlib.suppress(OSError), (run / PROVENANCE / NOTES).open("a") as file:
        file.write(json.dumps({"step": step, "text": text}) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a missing file gives no lines, and lines truncated by a full disk are skipped."""
    lines = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                lines.append(value)
    return lines
