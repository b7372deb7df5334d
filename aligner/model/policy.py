"""Megatron GPT model as a policy: forward step, response log-probabilities, loss reduction.

`attach_objective` makes a policy of any NeMo GPT model: it replaces the data step, forward step and loss reduction.
Weights, parallelism and trainer stay unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from aligner.backend import attention, context_parallel, device
from aligner.backend.device import communication_device
from aligner.data.batch import Batch, Split
from aligner.losses import metrics
from aligner.losses.logprobs import response_logprobs
from aligner.losses.objective import Objective, Scored
from aligner.model import head


def data_step(batches: Iterator[Batch], *_: Any) -> Batch:
    """Move the next micro-batch to this rank's device."""
    return next(batches).cuda()


def forward_step(model: Any, batch: Batch) -> Tensor:
    """Compute the negative log-probability of every response label, `[R, T]` float32 nats, on the last pipeline stage.

    Under context parallelism, the result covers this rank's positions. Attention without a mask is causal, and
    sequences are padded on the right: no mask is needed.
    """
    packed, tokens, positions = None, batch.tokens_RT, batch.positions_RT
    labels, scored = batch.labels_RT, batch.labels_RT.masked_fill(~batch.loss_mask_RT(), head.IGNORE_INDEX)
    if batch.cu_seqlens is not None:
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
    if context_parallel.cp_size() > 1:
        local = context_parallel.local_positions(batch.sequence_lengths()).to(tokens.device)
        tokens, positions, labels, scored = (x[:, local] for x in (tokens, positions, labels, scored))
    with head.fused_linear_cross_entropy(unwrap_model(model.module), scored):
        return model(tokens, positions, None, labels=labels, packed_seq_params=packed)


def logps(batch: Batch, token_nll_RT: Tensor) -> Tensor:
    """Compute the log-probability of each response, `[P, K]` nats.

    Training, validation, every reference and KTO's KL use this function.
    """
    token_nll_RT = context_parallel.gather_tokens(token_nll_RT, batch.sequence_lengths())
    if len(batch.unscored_U):
        token_nll_RT = token_nll_RT.masked_fill(~batch.loss_mask_RT(), 0.0)
    return batch.columns(response_logprobs(token_nll_RT, batch.start_S, batch.length_S))


def lengths(batch: Batch) -> Tensor:
    """Count the scored tokens of each response, `[P, K]`."""
    return batch.columns(batch.scored_S.float())


@dataclass
class StepState:
    """Values of the current global batch; `StepPreparation` creates a new one for each step."""

    kl: float = 0.0
    """KTO's estimate of KL(π ‖ π_ref) over the global batch, nats."""
    positions_per_example: float | None = None
    """Mean number of positions per example of the global batch, for mixtures of experts; None for a dense model."""
    nonfinite: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Row indices and mask of non-finite losses, for each micro-batch so far."""


class LossReduction(MegatronLossReduction):
    """Loss reduction that returns the sum of a micro-batch's losses and the number of examples.

    Megatron (`calculate_per_token_loss`) sums both over micro-batches and ranks and divides the gradient by the number
    of examples in the global batch: every example has the same weight.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.sets: list[tuple[int, int]] = []
        """First and last row (excluded) of parts of the split that are measured by themselves, too."""
        self.total: Tensor = metrics.empty()[None]
        """Metric sums of this rank since the last `pop_metrics`: of all examples, then of each set."""
        self.reference: Tensor | None = None
        """Reference log-probabilities of the split's examples, `[rows, K]`, on this rank's device."""
        self.rated = False
        """Whether the rows of the split have rewards."""
        self.state = StepState()

    def forward(self, batch: Batch, forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # type: ignore[override]
        logp, length = logps(batch, forward_out), lengths(batch)
        scored = Scored(
            logp_PK=logp,
            reference_PK=torch.zeros_like(logp) if self.reference is None else self.reference[batch.index_P],
            length_PK=length,
            reward_P2=batch.reward_P2,
            rated=self.rated,
            desirable_P=batch.desirable_P,
            valid_P=batch.valid_P,
            tokens_P=batch.columns(batch.total_S.float()).sum(dim=1),
            kl=self.state.kl,
        )
        total, preference, sft = self.objective(scored)
        measured = self.objective.compute_metrics(scored, total, preference, sft)
        sums = torch.stack([metrics.sums(measured), *(_sums_within(measured, batch, *rows) for rows in self.sets)])
        valid = batch.valid_P
        self.state.nonfinite.append((batch.index_P, ~total.detach().isfinite() & (valid > 0)))
        # Every rank of a context-parallel group has the full loss of an example; rank 0 counts the example.
        count = valid.sum().int() * (context_parallel.cp_rank() == 0)
        summed = (total * valid).sum()
        if self.state.positions_per_example is not None:
            # Megatron's router sums its auxiliary losses over the ranks that share a micro-batch, weighted by each
            # rank's number of positions, and divides by the count returned here: the positions of one rank.
            tensor = parallel_state.get_tensor_model_parallel_world_size()
            positions = torch.tensor(forward_out.numel() // tensor, device=count.device)
            count = positions.int() * (context_parallel.cp_rank() == 0)
            summed = summed * self.state.positions_per_example / (tensor * context_parallel.cp_size())
        return summed, count, {"sums": sums}

    def reduce(self, losses_reduced_per_micro_batch: Any) -> Tensor:
        step = torch.stack([x["sums"] for x in losses_reduced_per_micro_batch]).sum(dim=0)
        self.total = self.total.to(step.device) + step
        step = step[0]
        # Mean of this rank; the logged loss is exact over ranks (aligner.losses.metrics).
        loss, count = step[metrics.NAMES.index("loss")]
        return (loss / count.clamp(min=1)).float()

    def pop_metrics(self) -> list[dict[str, float]]:
        """Compute the metrics since the last call, over all ranks: of all examples, then of each of `sets`.

        Every rank must call.
        """
        total = self.total.expand(1 + len(self.sets), -1, -1).to(communication_device())
        self.total = metrics.empty()[None]
        return [metrics.finalize(sums) for sums in metrics.all_reduce_sums(total)]


def _sums_within(measured: Mapping[str, metrics.WeightedValue], batch: Batch, begin: int, end: int) -> Tensor:
    """Sum metrics over the examples of some rows."""
    inside = (batch.index_P >= begin) & (batch.index_P < end)
    return metrics.sums({name: metrics.WeightedValue(v.value_P, v.weight_P * inside) for name, v in measured.items()})


def attach_objective(model: Any, objective: Objective, *, interleaved: bool = False) -> dict[Split, LossReduction]:
    """Make a NeMo GPT model minimize `objective`; return the loss reduction of each split, which has the metrics."""
    model.config.data_step_fn = data_step
    model.config.forward_step_fn = forward_step
    model.config.calculate_per_token_loss = True
    # Pipeline stages exchange the shapes of micro-batches, which vary. Interleaved stages cannot: two messages between
    # the same two ranks could be confused (`aligner.data.loader` pads these batches).
    model.config.variable_seq_lengths = not interleaved
    if interleaved:
        # Megatron's rule for two ranks: forward and backward messages need separate channels.
        model.config.overlap_p2p_comm, model.config.batch_p2p_comm = True, False
    if device.no_transformer_engine():
        attention.replace_attention(model.config)
    # Megatron refuses its default dispatcher with variable lengths, even in models without experts.
    if model.config.moe_token_dispatcher_type == "allgather":
        model.config.moe_token_dispatcher_type = "alltoall"
    reductions: dict[Split, LossReduction] = {s: LossReduction(objective) for s in ("train", "validation")}
    _set_loss_reductions(model, reductions)
    # With interleaved stages, NeMo calls `reinit` for a rank's further stages; its own one builds them from the recipe
    # alone, without these changes.
    model.reinit = functools.partial(_build_further_stage, model, reductions)
    return reductions


def _set_loss_reductions(model: Any, reductions: dict[Split, LossReduction]) -> None:
    model._training_loss_reduction = reductions["train"]
    model._validation_loss_reduction = reductions["validation"]


def _build_further_stage(model: Any, reductions: dict[Split, LossReduction]) -> Any:
    stage = type(model)(model.config, tokenizer=model.tokenizer)
    _set_loss_reductions(stage, reductions)
    return stage
