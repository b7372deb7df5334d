"""Preparation of a step: its micro-batches, scores of a live reference, KTO's KL.

The loader returns all micro-batches of a step at once, and Megatron gets their number. A live reference's scores and
KTO's KL are computed here, without gradient and in the shapes of the training batches. Estimates over the global batch
therefore do not depend on its micro-batches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.megatron_parallel import MegatronStep

from aligner.backend.device import communication_device
from aligner.backend.randomness import seed_step
from aligner.data.batch import Batch, Split
from aligner.losses import metrics
from aligner.losses.metrics import WeightedValue
from aligner.model import policy, scoring
from aligner.model.policy import LossReduction, StepState
from aligner.model.reference import Reference


class StepPreparation(pl.Callback):
    """Callback that NeMo calls before each of Megatron's steps, in training and validation."""

    def __init__(
        self, trainer: Any, reductions: dict[Split, LossReduction], reference: Reference | None, *, seed: int
    ) -> None:
        self.trainer, self.reductions, self.reference, self.seed = trainer, reductions, reference, seed
        self._validated = False

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        if step.step_i == scoring.SCORING:
            return step
        fetched: Any = next(step.data)  # type: ignore[arg-type]
        # Lightning's loops return a tuple of the batches and counters.
        batches: list[Batch] = fetched[0] if isinstance(fetched, tuple) else fetched
        if not step.forward_only:
            strategy = self.trainer.strategy
            seed_step(self.seed, self.trainer.global_step, te_tracker=strategy.use_te_rng_tracker)
        self._prepare(batches, forward_only=step.forward_only)
        return dataclasses.replace(step, data=iter(batches), **scoring.step_kwargs(batches))

    def _prepare(self, batches: list[Batch], *, forward_only: bool) -> None:
        reduction = self.reductions["validation" if forward_only else "train"]
        state = reduction.state = StepState()
        live = self.reference is not None and self.reference.scored_per_step
        unpaired = reduction.objective.kind == "unpaired"
        mismatched = [batch.mismatched for batch in batches if batch.mismatched is not None]
        if live and not (forward_only and self._validated):
            assert self.reference is not None and reduction.reference is not None
            with self.reference.use_reference_model():
                self._score(reduction.reference, batches)
                if mismatched:
                    self._score(reduction.reference, mismatched)
        if unpaired:
            state.kl = self._kl(reduction, mismatched)
        if self.trainer.strategy.megatron_parallel[0].config.num_moe_experts and not forward_only:
            state.positions_per_example = self._positions_per_example(batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Each row has been scored, on the same rank that will validate it again.
        self._validated = self.reference is not None and not self.reference.scores_expire

    def _score(self, table: torch.Tensor, batches: list[Batch]) -> None:
        for batch, logp_PK in scoring.score_batches(self.trainer, batches):
            table[batch.index_P] = logp_PK

    def _positions_per_example(self, batches: list[Batch]) -> float:
        """Return positions per example of the global batch, padding included."""
        total = torch.tensor(
            [[batch.tokens_RT.numel(), batch.valid_P.sum()] for batch in batches], dtype=torch.float64
        ).sum(dim=0)
        total = total.to(communication_device())
        # Ranks with the same examples multiply both sums by the same factor.
        torch.distributed.all_reduce(total)
        return float(total[0] / total[1])

    def _kl(self, reduction: LossReduction, mismatched: list[Batch]) -> float:
        """Return max(0, mean of log π - log π_ref over the global batch's mismatched rows), Ethayarajh et al. 2024."""
        total = metrics.empty(communication_device())
        for batch, logp_PK in scoring.score_batches(self.trainer, mismatched):
            ratio = logp_PK
            if reduction.reference is not None:
                ratio = ratio - reduction.reference[batch.index_P]
            if reduction.objective.average_log_probs:
                ratio = ratio / policy.lengths(batch)
            total += metrics.sums({"kl": WeightedValue(ratio[:, 0], batch.valid_P)}).to(total.device)
        return metrics.floored(metrics.finalize(metrics.all_reduce_sums(total))["kl"])
