"""Which rows a global batch holds, and how it is cut: every row once, whatever the ranks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.data.microbatches import Batching, MicrobatchSplitter
from aligner.data.sampler import GlobalBatchSampler, counts

BATCHINGS: list[Batching] = ["padded", "length_grouped", "padding_free", "packed"]


def test_an_epoch_is_every_unit_once_in_an_order_of_its_own() -> None:
    order = GlobalBatchSampler(1, (7, 5))
    epochs = [order.epoch(e).tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert GlobalBatchSampler(2, (12,)).epoch(0).tolist() != epochs[0] == GlobalBatchSampler(1, (12,)).epoch(0).tolist()
    # Steps of 5 leave two units out of each epoch: the last two of the first, those before them of the second.
    assert [order.global_batch(step, 5).tolist() for step in (0, 1)] == [epochs[0][:5], epochs[0][5:10]]
    kept = [row for row in epochs[1] if row not in epochs[0][8:10]]
    assert [order.global_batch(step, 5).tolist() for step in (2, 3)] == [kept[:5], kept[5:]]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(1, 8))
def test_no_row_is_left_out_twice_before_every_other_was(rows: int, size: int, seed: int, epochs: int) -> None:
    size = min(size, rows)
    order, steps = GlobalBatchSampler(seed, (rows,)), rows // size
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        batches = [order.global_batch(epoch * steps + step, size).tolist() for step in range(steps)]
        used = [row for batch in batches for row in batch]
        assert len(used) == len(set(used)) == steps * size, "each at most once in an epoch"
        seen.update(used)
    times = [seen[row] for row in range(rows)]
    assert max(times) - min(times) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 10)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(1, 5),
)
def test_a_blend_takes_turns_within_each_file(files: list[tuple[int, float]], seed: int, epochs: int) -> None:
    sizes, weights = (tuple(x) for x in zip(*files, strict=True))
    order = GlobalBatchSampler(seed, sizes, weights)
    seen = Counter(int(row) for e in range(epochs) for row in order.epoch(e))
    starts = np.cumsum([0, *sizes])
    for number, count in enumerate(counts(sizes, weights)):
        times = [seen[row] for row in range(starts[number], starts[number + 1])]
        assert sum(times) == epochs * count
        assert max(times) - min(times) <= 1
    assert len(order.epoch(0)) == sum(sizes)


def test_weights_are_shares_of_an_epoch() -> None:
    assert counts((100, 100, 100), (3, 1, 2)) == [150, 50, 100]
    assert counts((10, 1), (0.5, 0.5)) in ([6, 5], [5, 6])
    rows = GlobalBatchSampler(0, (1000, 1000), (0.9, 0.1)).epoch(0)
    # Mixed throughout, not one file after the other.
    assert 0.05 < (rows[:1000] >= 1000).mean() < 0.15


@given(
    st.sampled_from(BATCHINGS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
def test_every_rank_gets_as_many_micro_batches_and_every_row_falls_into_one(
    batching: Batching, ranks: int, micro_batch_size: int, every: int, lengths: list[int]
) -> None:
    tokens = np.array(lengths)
    cutting = MicrobatchSplitter(
        batching, micro_batch_size, 60, tokens=2 * tokens, longest=tokens, microbatch_multiple=every
    )
    if batching == "packed":
        cutting = MicrobatchSplitter(
            batching, micro_batch_size, 100, tokens=2 * tokens, longest=tokens, microbatch_multiple=every
        )
    units = np.random.default_rng(0).permutation(len(tokens))
    cut = cutting(units, ranks)
    assert len(cut) == ranks and len({len(micros) for micros in cut}) == 1 and len(cut[0]) % every == 0
    micros = [micro for rank in cut for micro in rank]
    assert all(micros)
    assert sorted(row for micro in micros for row, valid in micro if valid) == list(range(len(tokens)))
    for micro in micros:
        if batching == "packed":
            assert sum(cutting.tokens[row] for row, _ in micro) <= 100 * micro_batch_size
        else:
            assert len(micro) == micro_batch_size


def test_grouping_by_length_pads_less() -> None:
    longest = np.random.default_rng(0).integers(1, 1000, 64)

    def padded(batching: Batching) -> int:
        cut = MicrobatchSplitter(batching, 4, 0, tokens=2 * longest, longest=longest)(np.arange(64), 2)
        return sum(len(micro) * max(longest[row] for row, _ in micro) for rank in cut for micro in rank)

    assert padded("length_grouped") < 1.1 * longest.sum() < 1.5 * longest.sum() < padded("padded")


def test_packs_made_ahead_of_time_stay_together() -> None:
    packs = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5])]
    tokens = np.ones(6, int)
    cut = MicrobatchSplitter("padded", 1, 0, tokens=tokens, longest=tokens, packs=packs)(np.array([2, 0]), 2)
    assert cut == [[[(2, True), (4, True), (5, True)]], [[(0, True), (3, True)]]]
    # Rows that are in no pack (mismatched ones) are units behind them.
    assert MicrobatchSplitter("padded", 1, 0, tokens=tokens, longest=tokens, packs=packs)(np.array([3 + 4]), 1) == [
        [[(4, True)]]
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_rank_gets_the_longest_of_every_round(ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 90, 120)
    cut = MicrobatchSplitter("packed", 1, 100, tokens=lengths, longest=lengths)(np.arange(120), ranks)
    loads = [sum(int(lengths[row]) for micro in rank for row, valid in micro if valid) for rank in cut]
    assert max(loads) <= 1.05 * min(loads)
