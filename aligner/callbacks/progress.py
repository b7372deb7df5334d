"""Progress on the screen: step, time left, loss, accuracy and margin.

NeMo's own progress printer gathers Megatron's timers on rank 0 alone. On gloo, that empty collective puts rank 0 one
operation ahead of the others, and the next real collective never returns.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from aligner.callbacks.metrics_callback import MetricsCallback
from aligner.common.console import messages

SHOWN = {"loss": "train/loss", "acc": "train/acc", "margin": "train/rewards_margin_mean"}
VALIDATED = {"val_loss": "val/loss", "val_acc": "val/acc", "val_margin": "val/rewards_margin_mean"}


class Progress(ProgressBar):
    """Progress bar on a terminal; `LINES` lines per run if the output goes to a file, fewer in a notebook."""

    LINES = 20
    """Lines of a whole run without a terminal."""

    def __init__(self, metrics: MetricsCallback) -> None:
        super().__init__()
        self.metrics = metrics
        self.bar: Any = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        terminal, notebook = sys.stderr.isatty(), messages() is not sys.stderr
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="Aligning",
            unit="step",
            disable=not (self._enabled and trainer.is_global_zero),
            dynamic_ncols=terminal,
            miniters=None if terminal else max(1, trainer.max_steps // (5 if notebook else self.LINES)),
            mininterval=0.1 if terminal else 0,
            maxinterval=10 if terminal else float("inf"),
            file=sys.stderr if terminal else _Lines(),
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.bar.set_postfix(self._values(SHOWN), refresh=False)
        self.bar.update()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and trainer.is_global_zero:
            values = "  ".join(f"{name} {value}" for name, value in self._values(VALIDATED).items())
            tqdm.write(f"Validation after step {trainer.global_step}: {values}", file=messages())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def _values(self, names: dict[str, str]) -> dict[str, str]:
        return {name: f"{self.metrics.latest[key]:.3f}" for name, key in names.items() if key in self.metrics.latest}


class _Lines:
    """Stream that turns tqdm's carriage returns into lines, for logs."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            messages().write(text + "\n")

    def flush(self) -> None:
        messages().flush()
