"""Callback that measures every step and validation, checks step 0, and writes loggers and `metrics.csv`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.callbacks import PEFT

from aligner.backend.hardware import compute_dtype
from aligner.callbacks import sanity_checks
from aligner.callbacks.loss_anomaly import LossAnomalyCallback
from aligner.callbacks.metrics_csv import MetricsCSV
from aligner.callbacks.validation_loop import is_due, validate_now
from aligner.data.batch import Split
from aligner.data.module import AlignDataModule
from aligner.losses import metrics
from aligner.model.policy import LossReduction


class MetricsCallback(pl.Callback):
    """Logs metrics by step.

    A metric of step s is measured with the weights after s optimizer steps: step 0 is the starting policy.
    """

    def __init__(
        self,
        *,
        data: AlignDataModule,
        reductions: dict[Split, LossReduction],
        csv_path: Path,
        anomalies: LossAnomalyCallback,
        policy_is_reference: bool,
    ) -> None:
        self.data, self.reductions, self.anomalies = data, reductions, anomalies
        self.csv, self.policy_is_reference = MetricsCSV(csv_path), policy_is_reference
        self.latest: dict[str, float] = {}
        """The newest value of every metric."""
        self._began = 0.0
        self._lr = 0.0
        self._log_every_n_steps = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.csv.add_sets(list(self.data.validation_sets))
        self.reductions["validation"].sets = list(self.data.validation_sets.values())
        for split, corpus in self.data.datasets.items():
            self.reductions[split].rated = corpus.report.with_rewards
        # Set by Lightning outside its class.
        self._log_every_n_steps = getattr(trainer, "log_every_n_steps")  # noqa: B009
        if trainer.is_global_zero:
            self.csv.open(keep_before=trainer.global_step)
        trainer.fit_loop.epoch_loop.began = trainer.global_step  # type: ignore[attr-defined]
        # Also after a resume: Lightning saves before it validates, so a kill may have come in between.
        if trainer.enable_validation and is_due(trainer):
            validate_now(trainer)

    # ---- training ---------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._began = time.perf_counter()
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        values, step = self.reductions["train"].pop_metrics()[0], trainer.global_step - 1
        logged_norm = trainer.callback_metrics.get("grad_norm")
        grad_norm = None if logged_norm is None else float(logged_norm)
        self.anomalies.after_step(trainer, values["loss"], grad_norm)
        if step == 0:
            self._check_first_step(values, grad_norm, trainer)
        samples_since = (trainer.global_step - self.data.first_step) * self.data.global_batch_size
        values |= {
            "lr": self._lr,
            "consumed_samples": self.data.consumed_samples + samples_since,
            "tokens_per_second": values["tokens"] * self.data.examples_in(step) / seconds,
            "step_time": seconds,
        }
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        self._log(trainer, "train", values, step)

    def _check_first_step(self, values: dict[str, float], grad_norm: float | None, trainer: pl.Trainer) -> None:
        config = trainer.strategy.megatron_parallel[0].config  # type: ignore[attr-defined]
        dropout = config.hidden_dropout or config.attention_dropout or _adapter_dropout(trainer)
        if self.policy_is_reference and not dropout:
            sanity_checks.check_policy_matches_reference(values, compute_dtype(config))
        sanity_checks.check_first_gradient(grad_norm)

    # ---- validation -------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values, *of_sets = self.reductions["validation"].pop_metrics()
        seconds = time.perf_counter() - self._began
        examples = self.data.datasets["validation"].num_examples
        values |= {"tokens_per_second": values["tokens"] * examples / seconds, "step_time": seconds}
        monitored = {f"val/{name}": values[name] for name in metrics.LOGGED if name in values}
        for name, measured in zip(self.data.validation_sets, of_sets, strict=True):
            of_set = {f"{name}/{metric}": measured[metric] for metric in metrics.LOGGED if metric in measured}
            monitored |= {f"val/{metric}": value for metric, value in of_set.items()}
            values |= of_set
        # For what `log.ckpt.monitor` names.
        pl_module.log_dict(monitored, batch_size=1)
        self._log(trainer, "val", values, trainer.global_step)

    def _log(self, trainer: pl.Trainer, split: str, values: dict[str, float], step: int) -> None:
        row = {f"{split}/{name}": value for name, value in values.items() if name not in metrics.INTERNAL}
        self.latest.update(row)
        if split == "train" and step % self._log_every_n_steps and trainer.global_step != trainer.max_steps:
            return
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        if trainer.is_global_zero:
            self.csv.write(step, row)


def _adapter_dropout(trainer: pl.Trainer) -> bool:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(cb, "dropout", 0) for cb in callbacks if isinstance(cb, PEFT))
