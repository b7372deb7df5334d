"""Which positions a context-parallel rank holds; how a mixture of experts weighs what."""

import torch

from aligner import context_parallel, losses
from aligner.batch import collate
from aligner.examples import Example
from aligner.objective import Objective
from aligner.policy import LossReduction


def test_every_position_is_held_once_and_ranks_have_the_same_work() -> None:
    lengths = [8, 16, 4]
    parts = context_parallel.held(lengths, 2)
    assert parts.shape == (2, 14)
    assert sorted(parts.flatten().tolist()) == list(range(28))
    assert parts[0, :4].tolist() == [0, 1, 6, 7] and parts[1, :4].tolist() == [2, 3, 4, 5]
    assert parts[0, 4:12].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    # Under causal attention a position looks at all before it.
    work = [int((part - torch.tensor([0] * 4 + [8] * 8 + [24] * 2)).sum()) for part in parts]
    assert work[0] == work[1]


def test_what_is_gathered_comes_in_order() -> None:
    parts = context_parallel.held([8, 4], 2)
    assert parts.flatten()[parts.flatten().argsort()].tolist() == list(range(12))


def items(*sizes: int) -> list[object]:
    from aligner.batch import Item

    return [Item(i, Example(f"f:{i}", [1] * n, ([2] * n, [3, 4]))) for i, n in enumerate(sizes)]


def test_in_a_mixture_of_experts_pairs_weigh_by_pairs_and_auxiliary_losses_by_positions() -> None:
    """What is returned is divided by what is counted, over all micro-batches; auxiliary losses by Megatron, too."""
    micros = [collate(items(2, 3), pad_id=0), collate(items(9), pad_id=0)]  # type: ignore[arg-type]
    reduction = LossReduction(Objective(loss=losses.dpo))
    torch.manual_seed(0)
    nll = [torch.rand(batch.tokens_RT.shape) for batch in micros]
    plain = [reduction.forward(batch, x)[:2] for batch, x in zip(micros, nll, strict=True)]
    mean = sum(loss for loss, _ in plain) / sum(count for _, count in plain)
    positions = [batch.tokens_RT.numel() for batch in micros]
    reduction.positions = sum(positions) / 3
    experts = [reduction.forward(batch, x)[:2] for batch, x in zip(micros, nll, strict=True)]
    assert [int(count) for _, count in experts] == positions
    torch.testing.assert_close(sum(loss for loss, _ in experts) / sum(positions), mean)
