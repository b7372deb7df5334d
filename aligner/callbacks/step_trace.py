"""A note of every step of a run, on every rank, to the last bit: its rows, its numbers, its random states."""

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
    """Writes a line a step to `PATH.RANK`.

    Args:
        path: of the files, without the rank's number.
        kill_after: end this process by SIGKILL when so many steps have been made; None: never.
    """

    def __init__(self, path: str, kill_after: Optional[int] = None) -> None:
        self.path, self.kill_after = path, kill_after
        self._rows: list[int] = []

    def on_megatron_microbatch_start(self, step: Any, batch: Any, forward_callback: Any) -> None:
        if not step.forward_only:
            self._rows += [int(row) for row, valid in zip(batch.index_P, batch.valid_P, strict=True) if valid]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        latest = next(cb.latest for cb in trainer.callbacks if isinstance(cb, MetricsCallback))  # type: ignore[attr-defined]
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
        # One step late, so that what is saved after the last one is being written, or is there.
        if trainer.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def _bits(value: Any) -> str | None:
    return None if value is None else float(value).hex()


def read(path: str | Path, rank: int) -> dict[int, dict[str, Any]]:
    """The notes of a rank by step; of a step that was made twice, the later one."""
    lines = Path(f"{path}.{rank}").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}
