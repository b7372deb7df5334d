"""Before a step: its micro-batches are fetched, and what must be known of all of them is found out.

The loader gives all micro-batches of a step at once, and Megatron is told how many there are. A live reference's
scores and KTO's KL are made here, without gradient and in the shapes in which the batches will be trained. What is
estimated over the global batch so does not depend on how it was cut.
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
    """Called by NeMo before each of Megatron's steps, in training and validation."""

    def __init__(
        self, trainer: Any, reductions: dict[Split, LossReduction], reference: Reference | None, *, seed: int
    ) -> None:
        self.trainer, self.reductions, self.reference, self.seed = trainer, reductions, reference, seed
        self._validated = False

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        if step.step_i == scoring.SCORING:
            return step
        fetched: Any = next(step.data)  # type: ignore[arg-type]
        # Lightning's loops put numbers beside it.
        batches: list[Batch] = fetched[0] if isinstance(fetched, tuple) else fetched
        if not step.forward_only:
            strategy = self.trainer.strategy
            seed_step(self.seed, self.trainer.global_step, te_tracker=strategy.use_te_rng_tracker)
        self._look(batches, forward_only=step.forward_only)
        return dataclasses.replace(step, data=iter(batches), **scoring.step_kwargs(batches))

    def _look(self, batches: list[Batch], *, forward_only: bool) -> None:
        reduction = self.reductions["validation" if forward_only else "train"]
        state = reduction.state = StepState()
        live = self.reference is not None and self.reference.scored_per_step
        unpaired = reduction.objective.kind == "unpaired"
        others = [batch.mismatched for batch in batches if batch.mismatched is not None]
        if live and not (forward_only and self._validated):
            assert self.reference is not None and reduction.reference is not None
            with self.reference.use_reference_model():
                self._score(reduction.reference, batches)
                if others:
                    self._score(reduction.reference, others)
        if unpaired:
            state.kl = self._kl(reduction, others)
        if self.trainer.strategy.megatron_parallel[0].config.num_moe_experts and not forward_only:
            state.positions_per_example = self._positions(batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Each row has been scored by now, on whatever rank it will fall to again.
        self._validated = self.reference is not None and not self.reference.scores_expire

    def _score(self, table: torch.Tensor, batches: list[Batch]) -> None:
        for batch, logp_PK in scoring.score_batches(self.trainer, batches):
            table[batch.index_P] = logp_PK

    def _positions(self, batches: list[Batch]) -> float:
        """Positions of the global batch, what is padded included, an example."""
        total = torch.tensor(
            [[batch.tokens_RT.numel(), batch.valid_P.sum()] for batch in batches], dtype=torch.float64
        ).sum(dim=0)
        total = total.to(communication_device())
        # Ranks that see the same examples multiply both alike.
        torch.distributed.all_reduce(total)
        return float(total[0] / total[1])

    def _kl(self, reduction: LossReduction, others: list[Batch]) -> float:
        """max(0, mean of log π - log π_ref of mismatched responses over the global batch), Ethayarajh et al. 2024."""
        total = metrics.empty(communication_device())
        for batch, logp_PK in scoring.score_batches(self.trainer, others):
            ratio = logp_PK
            if reduction.reference is not None:
                ratio = ratio - reduction.reference[batch.index_P]
            if reduction.objective.average_log_probs:
                ratio = ratio / policy.lengths(batch)
            total += metrics.sums({"kl": WeightedValue(ratio[:, 0], batch.valid_P)}).to(total.device)
        return max(0.0, metrics.finalize(metrics.all_reduce_sums(total))["kl"])
