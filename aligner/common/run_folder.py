"""Names and readers of the files in a run's folder."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

METRICS = "metrics.csv"
"""Metrics: one line per step, one column per metric."""
RECIPE = "config.yaml"
"""Recipe; `nemo llm align --yaml config.yaml` runs it again."""
SAMPLES = "samples.jsonl"
"""Sample responses: one line per prompt with `prompt`, `before`, `after`."""
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
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError):
                lines.append({k: float(v) for k, v in row.items() if v})
    return lines


def job_files(run: Path) -> list[Path]:
    """List the `job.json` of each job of a run, in the order of the jobs."""
    return sorted((run / PROVENANCE).glob("job-*/job.json"), key=lambda path: int(path.parent.name[4:]))


def ending(run: Path) -> str | None:
    """Return how the newest job of a run ended by its own record: `success`, `preempted`, `failed` or `stopped`.

    `stopped` is a job that recorded no end; None: there is no record here.
    """
    files = job_files(run)
    with contextlib.suppress(OSError, ValueError):
        return json.loads(files[-1].read_text()).get("ended", {}).get("status", "stopped") if files else None
    return None


def add_note(run: Path, step: int, text: str) -> None:
    """Append an observation for the run's report; only rank 0 calls it."""
    # A failed write must not stop the run: the other ranks would wait for this rank.
    with contextlib.suppress(OSError), (run / PROVENANCE / NOTES).open("a") as file:
        file.write(json.dumps({"step": step, "text": text}) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a missing file gives no lines, and lines truncated by a full disk are skipped."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
