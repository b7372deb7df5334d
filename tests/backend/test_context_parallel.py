"""Which positions a context-parallel rank holds."""

import torch

from aligner.backend import context_parallel


def test_every_position_is_held_once_and_ranks_have_the_same_work() -> None:
    parts = context_parallel.rank_positions((8, 16, 4), 2)
    assert parts.shape == (2, 14)
    assert sorted(parts.flatten().tolist()) == list(range(28))
    assert parts[0, :4].tolist() == [0, 1, 6, 7] and parts[1, :4].tolist() == [2, 3, 4, 5]
    assert parts[0, 4:12].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    # Under causal attention a position looks at all before it.
    work = [int((part - torch.tensor([0] * 4 + [8] * 8 + [24] * 2)).sum()) for part in parts]
    assert work[0] == work[1]
