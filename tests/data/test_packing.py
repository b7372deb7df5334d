import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.common.errors import ConfigError
from aligner.data.packing import Algorithm, fill, pack

ALGORITHMS: list[Algorithm] = ["first_fit_shuffle", "first_fit_decreasing", "best_fit_decreasing"]


def first_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """The rule as it is told: each item in its turn into the first pack that has room."""
    room, packs = [], []
    for item in order:
        for number, left in enumerate(room):
            if left >= lengths[item]:
                room[number] -= lengths[item]
                packs[number].append(item)
                break
        else:
            room.append(capacity - lengths[item])
            packs.append([item])
    return packs


def best_fit(lengths: list[int], order: list[int], capacity: int) -> list[int]:
    """How full its packs are; which of two packs that are equally full comes first is left open."""
    room: list[int] = []
    for item in order:
        fitting = [left for left in room if left >= lengths[item]]
        if fitting:
            room[room.index(min(fitting))] -= lengths[item]
        else:
            room.append(capacity - lengths[item])
    return sorted(room)


ITEMS = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))
)


@given(ITEMS, st.integers(0, 5))
def test_every_item_once_and_no_pack_too_long_by_the_rule_of_its_name(case: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = case
    for algorithm in ALGORITHMS:
        packs = pack(lengths, capacity, algorithm=algorithm, seed=seed)
        assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
        assert all(p and sum(lengths[i] for i in p) <= capacity for p in packs)
    decreasing = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shuffled = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    assert pack(lengths, capacity, algorithm="first_fit_decreasing") == first_fit(lengths, decreasing, capacity)
    assert pack(lengths, capacity, algorithm="first_fit_shuffle", seed=seed) == first_fit(lengths, shuffled, capacity)
    room = sorted(capacity - sum(lengths[i] for i in p) for p in pack(lengths, capacity))
    assert room == best_fit(lengths, decreasing, capacity)


def test_the_seed_alone_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    one, again, other = (pack(lengths, 200, algorithm="first_fit_shuffle", seed=s) for s in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packs_of_a_realistic_lot_are_full(algorithm: Algorithm) -> None:
    lengths = np.random.default_rng(0).lognormal(6.6, 0.8, 20_000).clip(8, 8192).astype(int)
    packs = pack(lengths, 8192, algorithm=algorithm)
    assert fill(lengths, packs, 8192) > (0.98 if algorithm == "first_fit_shuffle" else 0.999)


@pytest.mark.parametrize(
    ("lengths", "algorithm", "message"),
    [
        ([3, 9, 4], "best_fit_decreasing", "item 1 alone has 9 tokens, a pack has room for 8"),
        ([3, 0], "best_fit_decreasing", "item 1 has length 0"),
        ([3], "next_fit", "'next_fit' is not one of first_fit_shuffle, first_fit_decreasing, best_fit_decreasing"),
    ],
)
def test_what_cannot_be_packed_is_named(lengths: list[int], algorithm: Algorithm, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(lengths, 8, algorithm=algorithm)


def test_nothing_needs_no_pack() -> None:
    assert pack([], 8) == []
