"""`metrics.csv`: one line a step, one column a metric. `aligner.common.run_folder` reads it."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.common.run_folder import read_metrics
from aligner.losses import metrics


class MetricsCSV:
    """The file that a run appends to; a resumed run drops the lines that it will write again."""

    COLUMNS = (*metrics.LOGGED, "tokens_per_second", "step_time")
    TRAIN_ONLY = ("grad_norm", "lr", "consumed_samples")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["step"] + [f"train/{name}" for name in (*self.COLUMNS, *self.TRAIN_ONLY)]
        self.columns += [f"val/{name}" for name in self.COLUMNS]

    def add_sets(self, names: list[str]) -> None:
        """Add columns for validation sets with names of their own."""
        self.columns += [f"val/{name}/{metric}" for name in names for metric in metrics.LOGGED]

    def open(self, *, keep_before: int) -> None:
        """Create the file, or keep the lines of steps before `keep_before` and continue after them."""
        kept: list[dict[str, float]] = []
        if self.path.exists() and keep_before > 0:
            kept = [row for row in read_metrics(self.path) if row["step"] < keep_before]
            if not kept:
                other = self.path.with_name(f"{self.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{self.path.suffix}")
                os.replace(self.path, other)
                log_rank0(f"{self.path} cannot be read and is now {other.name}; the metrics begin anew")
        # Such as those of a validation set that the run no longer has.
        self.columns += sorted({name for row in kept for name in row} - set(self.columns))
        with atomic_write(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(_formatted(row) for row in kept)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append one line."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step} | _formatted(row))


def _formatted(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.9g}" for name, value in row.items()}
