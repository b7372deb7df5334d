"""The last layer and the cross-entropy as one, at the positions that are scored, and never with all logits in memory.

Megatron makes logits `[T, R, V]` of every position, prompts and padding too, keeps them in float32 for the backward
pass and a copy beside them; for 8,192 tokens of Llama 3 that is 4 GB each. Here the hidden states of scored positions
alone go through the layer, `CHUNK_SIZE` at a time; the backward pass makes each piece of logits again.

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
"""Label of a position that nothing scores."""
CHUNK_SIZE = 1024
"""Positions whose logits are in memory at once: enough to keep a GPU busy, 512 MB of Llama 3's."""


@contextlib.contextmanager
def fused_linear_cross_entropy(core: Any, labels_RT: Tensor) -> Iterator[None]:
    """Within, Megatron's GPT model `core` returns the negative log-probabilities of labels by way of this file.

    It does so inside the call of its output layer, on which Megatron's hooks wait for the layer's weights. Left as they
    are: other output layers (Gemma's, which bounds its logits; adapters), multi-token prediction, and a user's choice
    of Megatron's own fused kernel (`model.config.cross_entropy_loss_fusion`).
    """
    if not core.post_process or not _plain(core):
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


def _plain(core: Any) -> bool:
    config = core.config
    return (
        type(core.output_layer) is ColumnParallelLinear
        and not config.cross_entropy_loss_fusion
        and not core.mtp_process
        and not config.defer_embedding_wgrad_compute
    )


def _scored(layer: Any, hidden_TRH: Tensor, weight_VH: Tensor, labels_RT: Tensor) -> Tensor:
    """-log p of each label, `[R, T]` float32 nats; 0 where there is none."""
    if layer.sequence_parallel:
        # The backward pass adds up what each rank's part of the vocabulary has to say.
        hidden_TRH = gather_from_sequence_parallel_region(hidden_TRH, group=layer.tp_group)
    else:
        hidden_TRH = copy_to_tensor_model_parallel_region(hidden_TRH, group=layer.tp_group)
    label_N = labels_RT.T.flatten()
    places = (label_N != IGNORE_INDEX).nonzero().squeeze(1)
    nll_N: Any = TokenNLL.apply(
        hidden_TRH.flatten(0, 1).index_select(0, places), weight_VH, label_N[places], layer.tp_group
    )
    everywhere = nll_N.new_zeros(label_N.shape).index_copy(0, places, nll_N)
    return everywhere.reshape(labels_RT.T.shape).T.contiguous()


class TokenNLL(torch.autograd.Function):
    """log Σ_v exp(h · w_v) - h · w_label of each row of `hidden_NH`, `[N]` float32 nats.

    Products are in the weights' precision, all that follows is in float32. The gradient of the hidden states is that of
    this rank's part of the vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, label_N: Tensor, group: Any) -> Tensor:
        own_N = label_N - group.rank() * len(weight_VH)
        mine_N = (own_N >= 0) & (own_N < len(weight_VH))
        own_N = own_N.clamp(0, len(weight_VH) - 1)
        largest_N, sum_N, wanted_N = (hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32) for _ in range(3))
        for part in _pieces(len(hidden_NH)):
            logits = _logits(hidden_NH[part], weight_VH)
            wanted_N[part] = logits.gather(1, own_N[part, None]).squeeze(1)
            largest_N[part] = logits.amax(dim=1)
            sum_N[part] = logits.sub_(largest_N[part, None]).exp_().sum(dim=1)
            del logits
        wanted_N *= mine_N
        if group.size() > 1:
            of_rank = largest_N.clone()
            torch.distributed.all_reduce(largest_N, torch.distributed.ReduceOp.MAX, group=group)
            both = torch.stack([sum_N * (of_rank - largest_N).exp(), wanted_N])
            torch.distributed.all_reduce(both, group=group)
            sum_N, wanted_N = both
        log_sum_N = largest_N + sum_N.log()
        ctx.save_for_backward(hidden_NH, weight_VH, own_N, mine_N, log_sum_N)
        return log_sum_N - wanted_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_N,) = grads
        hidden_NH, weight_VH, own_N, mine_N, log_sum_N = ctx.saved_tensors
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_NH) if learns_hidden else None
        # Pieces are added up in float32, as Megatron adds up micro-batches.
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if learns_weight else None
        for part in _pieces(len(hidden_NH)):
            p = _logits(hidden_NH[part], weight_VH).sub_(log_sum_N[part, None]).exp_()
            p.scatter_add_(1, own_N[part, None], -mine_N[part, None].to(p.dtype))
            p = p.mul_(grad_N[part, None]).to(weight_VH.dtype)
            if grad_hidden is not None:
                torch.mm(p, weight_VH, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += p.T @ hidden_NH[part]
            del p
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None


def _pieces(count: int) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK_SIZE) for begin in range(0, count, CHUNK_SIZE))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(hidden, weight.T).float()
