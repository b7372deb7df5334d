"""Fused output layer and cross-entropy at scored positions, without materializing all logits.

Megatron computes logits `[T, R, V]` of every position, including prompts and padding. It keeps them in
float32 for the backward pass, and a copy: 4 GB each for 8,192 tokens of Llama 3. This module applies the layer to
scored positions only, `CHUNK_SIZE` at a time; the backward pass recomputes each chunk of logits.

Dimensions: N scored positions, H hidden size, V entries of the vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not scored."""
CHUNK_SIZE = 1024
"""Positions with logits in memory at a time: enough to saturate a GPU, 512 MB for Llama 3."""


@contextlib.contextmanager
def fused_linear_cross_entropy(core: Any, labels_RT: Tensor) -> Iterator[None]:
    """Make Megatron's GPT model `core` compute the negative log-probabilities of labels with this module.

    The computation runs inside the call of the output layer, where Megatron's hooks wait for the layer's weights.
    Unchanged: other output layers (Gemma's soft-capped logits; adapters), multi-token prediction, and Megatron's own
    fused kernel (`model.config.cross_entropy_loss_fusion`).
    """
    if not core.post_process or not _is_supported(core):
        yield
        return
    layer = core.output_layer

    def forward(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        return _scored(layer, hidden, layer.weight if weight is None else weight, labels_RT), None

    layer.forward, core.compute_language_model_loss = forward, lambda labels, nll_RT: nll_RT
    try:
        yield
    finally:
        del layer.forward, core.compute_language_model_loss


def _is_supported(core: Any) -> bool:
    config = core.config
    return (
        type(core.output_layer) is ColumnParallelLinear
        and not config.cross_entropy_loss_fusion
        and not core.mtp_process
        and not config.defer_embedding_wgrad_compute
    )


def _scored(layer: Any, hidden_TRH: Tensor, weight_VH: Tensor, labels_RT: Tensor) -> Tensor:
    """Compute -log p of each label, `[R, T]` float32 nats; 0 at `IGNORE_INDEX`."""
    if layer.sequence_parallel:
        # The backward pass sums the gradients of all vocabulary shards.
        hidden_TRH = gather_from_sequence_parallel_region(hidden_TRH, group=layer.tp_group)
    else:
        hidden_TRH = copy_to_tensor_model_parallel_region(hidden_TRH, group=layer.tp_group)
    label_N = labels_RT.T.flatten()
    positions = (label_N != IGNORE_INDEX).nonzero().squeeze(1)
    nll_N: Any = TokenNLL.apply(
        hidden_TRH.flatten(0, 1).index_select(0, positions), weight_VH, label_N[positions], layer.tp_group
    )
    full_nll = nll_N.new_zeros(label_N.shape).index_copy(0, positions, nll_N)
    return full_nll.reshape(labels_RT.T.shape).T.contiguous()


class TokenNLL(torch.autograd.Function):
    """Negative log-probability log Σ_v exp(h · w_v) - h · w_label of each row of `hidden_NH`, `[N]` float32 nats.

    Matrix products use the precision of the weights; all later operations use float32. The gradient of the hidden
    states covers this rank's vocabulary shard.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, label_N: Tensor, group: Any) -> Tensor:
        local_label_N = label_N - group.rank() * len(weight_VH)
        is_local_N = (local_label_N >= 0) & (local_label_N < len(weight_VH))
        local_label_N = local_label_N.clamp(0, len(weight_VH) - 1)
        max_N, sum_N, label_logit_N = (hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32) for _ in range(3))
        for chunk in _chunks(len(hidden_NH)):
            logits = _logits(hidden_NH[chunk], weight_VH)
            label_logit_N[chunk] = logits.gather(1, local_label_N[chunk, None]).squeeze(1)
            max_N[chunk] = logits.amax(dim=1)
            sum_N[chunk] = logits.sub_(max_N[chunk, None]).exp_().sum(dim=1)
            del logits
        label_logit_N *= is_local_N
        if group.size() > 1:
            local_max_N = max_N.clone()
            torch.distributed.all_reduce(max_N, torch.distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([sum_N * (local_max_N - max_N).exp(), label_logit_N])
            torch.distributed.all_reduce(sums, group=group)
            sum_N, label_logit_N = sums
        log_sum_N = max_N + sum_N.log()
        ctx.save_for_backward(hidden_NH, weight_VH, local_label_N, is_local_N, log_sum_N)
        return log_sum_N - label_logit_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_N,) = grads
        hidden_NH, weight_VH, local_label_N, is_local_N, log_sum_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_NH) if needs_hidden else None
        # Chunks accumulate in float32, as Megatron accumulates micro-batches.
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        for chunk in _chunks(len(hidden_NH)):
            p = _logits(hidden_NH[chunk], weight_VH).sub_(log_sum_N[chunk, None]).exp_()
            p.scatter_add_(1, local_label_N[chunk, None], -is_local_N[chunk, None].to(p.dtype))
            p = p.mul_(grad_N[chunk, None]).to(weight_VH.dtype)
            if grad_hidden is not None:
                torch.mm(p, weight_VH, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += p.T @ hidden_NH[chunk]
            del p
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None


def _chunks(count: int) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK_SIZE) for begin in range(0, count, CHUNK_SIZE))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(hidden, weight.T).float()
