"""What is done around the training steps: reference, gates, metrics to the loggers, the CSV that is always there."""

from __future__ import annotations

import contextlib
import csv
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.callbacks import PEFT

from aligner import adapters, gates, metrics
from aligner.batch import Split
from aligner.data import AlignDataModule
from aligner.errors import CheckpointError, ConfigError
from aligner.files import written_whole
from aligner.health import Health
from aligner.objective import Objective
from aligner.policy import LossReduction
from aligner.reference import Reference
from aligner.schedule import due, keep_shape, validate_now
from aligner.schedule import shape as keep_in_mind


class Watch(pl.Callback):
    """Follows one run.

    A metric of step s was measured with the weights after s optimizer steps: step 0 is the starting policy.
    """

    def __init__(
        self,
        *,
        data: AlignDataModule,
        reductions: dict[Split, LossReduction],
        reference: Reference | None,
        runs: Path,
        csv_path: Path,
        continued: Path | None,
        start_adapters: Path | None,
        health: Health,
    ) -> None:
        self.data, self.reductions, self.reference, self.runs = data, reductions, reference, runs
        self.continued, self.start_adapters, self.health = continued, start_adapters, health
        self._schedule: list[dict[str, Any]] = []
        self.csv = MetricsFile(csv_path)
        self.last: dict[str, float] = {}
        """The newest value of every metric, for the progress bar and the final table."""
        self._began = 0.0
        self._lr = 0.0
        self.every = 1

    @property
    def objective(self) -> Objective:
        return self.reductions["train"].objective

    # ---- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict() if self.reference else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        held = state_dict["reference"]
        if bool(held) != bool(self.reference):
            raise ConfigError(
                f"reference, loss: the run began {'with' if held else 'without'} a reference and would go on "
                f"{'without' if held else 'with'} one; restore them, or start under another log.name"
            )
        if self.reference:
            self.reference.load_state_dict(held)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.reference:
            checkpoint["reference"] = self.reference.sharded_state()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._schedule = keep_in_mind(trainer)
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, str(self.continued))
        if len(set(found)) > 1:
            raise CheckpointError(
                f"log.log_dir: ranks find different newest checkpoints ({', '.join(sorted(set(found)))}): their file "
                "systems differ, or another job has just been at work here; run the same command again"
            )

    # ---- training ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.every = getattr(trainer, "log_every_n_steps")  # noqa: B009 - set by Lightning outside its class
        if self.continued is not None:
            keep_shape(trainer, self._schedule)
        self._make_adapters(trainer)
        if self.reference:
            known = self.reference.prepare(trainer, self.data, runs=self.runs, continued=self.continued)
            for split, scores in known.items():
                self.reductions[split].reference = scores.to(pl_module.device)
        if trainer.is_global_zero:
            self.csv.open(keep_before=trainer.global_step)
        trainer.fit_loop.epoch_loop.began = trainer.global_step  # type: ignore[attr-defined]
        # Also after a resume: Lightning saves before it validates, so a kill may have come in between.
        if trainer.enable_validation and due(trainer):
            validate_now(trainer)

    def _make_adapters(self, trainer: pl.Trainer) -> None:
        """Adapters belong to the starting policy: NeMo would add them after the reference was scored."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PEFT):
                callback._maybe_apply_transform(trainer)
                if self.start_adapters is not None and self.continued is None:
                    adapters.load(trainer, self.start_adapters)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._began = time.perf_counter()
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        found, step = self.reductions["train"].take(), trainer.global_step - 1
        if self.reference:
            self.reference.after_step(trainer.global_step)
        grad_norm = trainer.callback_metrics.get("grad_norm")
        self.health.after_step(trainer, found["loss"], None if grad_norm is None else float(grad_norm))
        if step == 0:
            self._gate(found, None if grad_norm is None else float(grad_norm), trainer)
        size = self.data.global_batch_size
        found |= {
            "lr": self._lr,
            "consumed_samples": self.data.consumed_samples + (trainer.global_step - self.data.first_step) * size,
            "tokens_per_second": found["tokens"] * self.data.examples_in(step) / seconds,
            "step_time": seconds,
        }
        if grad_norm is not None:
            found["grad_norm"] = float(grad_norm)
        self._log(trainer, "train", found, step)

    def _gate(self, found: dict[str, float], grad_norm: float | None, trainer: pl.Trainer) -> None:
        config = trainer.strategy.megatron_parallel[0].config  # type: ignore[attr-defined]
        if self.reference and not (config.hidden_dropout or config.attention_dropout or self._adapter_dropout(trainer)):
            gates.policy_is_reference(found, gates.precision_of(config))
        gates.gradient_is_sound(grad_norm)

    @staticmethod
    def _adapter_dropout(trainer: pl.Trainer) -> bool:
        return any(getattr(cb, "dropout", 0) for cb in trainer.callbacks if isinstance(cb, PEFT))  # type: ignore[attr-defined]

    # ---- validation -------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = self.reductions["validation"].take()
        seconds = time.perf_counter() - self._began
        examples = self.data.examples["validation"].trained
        found |= {"tokens_per_second": found["tokens"] * examples / seconds, "step_time": seconds}
        # For what `log.ckpt.monitor` names.
        pl_module.log_dict({f"val/{name}": found[name] for name in metrics.LOGGED if name in found}, batch_size=1)
        self._log(trainer, "val", found, trainer.global_step)

    def _log(self, trainer: pl.Trainer, split: str, found: dict[str, float], step: int) -> None:
        row = {f"{split}/{name}": value for name, value in found.items() if name not in metrics.INTERNAL}
        self.last.update(row)
        if split == "train" and step % self.every and trainer.global_step != trainer.max_steps:
            return
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        if trainer.is_global_zero:
            self.csv.write(step, row)


class MetricsFile:
    """`metrics.csv`: one line a step, one column a metric; a resumed run drops the lines it will write again."""

    COLUMNS = (*metrics.LOGGED, "tokens_per_second", "step_time")
    TRAIN_ONLY = ("grad_norm", "lr", "consumed_samples")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["step"] + [f"train/{name}" for name in (*self.COLUMNS, *self.TRAIN_ONLY)]
        self.columns += [f"val/{name}" for name in self.COLUMNS]

    def open(self, *, keep_before: int) -> None:
        """Begin the file, or go on with it keeping what was measured before step `keep_before`."""
        kept: list[dict[str, float]] = []
        if self.path.exists() and keep_before > 0:
            kept = [row for row in read_metrics(self.path) if row["step"] < keep_before]
        with written_whole(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows({k: _shown(v) for k, v in row.items()} for row in kept)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append one line."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step} | {k: _shown(v) for k, v in row.items()})


def _shown(value: float) -> str:
    return f"{value:.9g}"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.csv`; a line holds what was measured, no empty fields.

    A file that is not there has no lines, and a line that a full disk cut off is left out.
    """
    if not Path(path).exists():
        return []
    lines = []
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError):
                lines.append({k: float(v) for k, v in row.items() if v})
    return lines
