"""The files that a run leaves in its folder, for those that write them and those that read them."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

METRICS = "metrics.csv"
"""One line a step, one column a metric."""
RECIPE = "config.yaml"
"""The recipe; `nemo llm align --yaml config.yaml` runs it again."""
SAMPLES = "samples.jsonl"
"""A line a prompt: `prompt`, `before`, `after`."""
PROVENANCE = "provenance"
"""Folder with a folder for each job: recipe, code, packages, machine."""
NOTES = "notes.jsonl"
"""In `PROVENANCE`: observations during training, by step."""
WANDB_ID = "wandb_id"
"""In `PROVENANCE`: id of the run in Weights & Biases."""


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Lines of a run's `metrics.csv`, without their empty fields.

    A missing file has no lines. A line that a full disk cut off is left out.
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
    """`job.json` of each job that worked on a run, the first job first."""
    return sorted((run / PROVENANCE).glob("job-*/job.json"), key=lambda path: int(path.parent.name[4:]))


def add_note(run: Path, step: int, text: str) -> None:
    """Keep an observation for the run's report; rank 0 calls."""
    # Not worth a run: this is one rank, and the others would wait for it.
    with contextlib.suppress(OSError), (run / PROVENANCE / NOTES).open("a") as file:
        file.write(json.dumps({"step": step, "text": text}) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines of a file; a missing file has none, and lines that a full disk cut off are left out."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
