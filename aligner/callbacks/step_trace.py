"""Bitwise trace of a run's steps on every rank: rows, loss, gradient norm, learning rate, random states."""

import json
import os
import signal
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
from nemo.lightning.io.mixin import IOMixin

from aligner.backend import randomness
from aligner.callbacks.metrics_callback import MetricsCallback


class StepTrace(pl.Callback, IOMixin):
    """Callback that writes one line per step to `PATH.RANK`.

    Args:
        path: path of the files without the rank's number.
        kill_after: number of steps after which the process ends itself by SIGKILL; None: never.
    """

    def __init__(self, path: str, kill_after: Optional[int] = None) -> None:
        self.path, self.kill_after = path, kill_after
        self._rows: list[int] = []

    def on_megatron_microbatch_start(self, step: Any, batch: Any, forward_callback: Any) -> None:
        if not step.forward_only:
            self._rows += [int(row) for row, valid in zip(batch.index_P, batch.valid_P, strict=True) if valid]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        latest = next(cb.latest for cb in callbacks if isinstance(cb, MetricsCallback))
        line = {
            "step": trainer.global_step - 1,
            "rows": sorted(set(self._rows)),
            "loss": _bits(latest["train/loss"]),
            "gradient norm": _bits(latest.get("train/grad_norm")),
            "learning rate": _bits(trainer.optimizers[0].param_groups[0]["lr"]),
            "random states": randomness.states(),
        }
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._rows = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # When the next step starts, the last step's checkpoint is written or being written.
        if trainer.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def _bits(value: Any) -> str | None:
    return None if value is None else float(value).hex()


def read(path: str | Path, rank: int) -> dict[int, dict[str, Any]]:
    """Read a rank's lines by step; of a repeated step, the later line."""
    lines = Path(f"{path}.{rank}").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}
