"""Bin packing of sequence lengths, in near-linear time.

    first_fit_shuffle        items in random order, each into the first pack with enough room
    first_fit_decreasing     longest item first, each into the first pack with enough room
    best_fit_decreasing      longest item first, each into the fullest pack with enough room

First fit is computed pack by pack. The first pack of first fit equals the result of one pass over all items that adds
every item that still fits; the next pack is the same pass over the remaining items. In decreasing order, a pass needs
only the longest item that fits. In any other order, a tree of minima returns the next item.

Source: Johnson 1973, Near-optimal bin packing algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from aligner.common.errors import ConfigError

Algorithm = Literal["first_fit_shuffle", "first_fit_decreasing", "best_fit_decreasing"]


def pack(
    lengths: Sequence[int] | np.ndarray, capacity: int, *, algorithm: Algorithm = "best_fit_decreasing", seed: int = 0
) -> list[list[int]]:
    """Return the item indices of each pack; each index occurs once, and no pack is longer than `capacity`.

    Args:
        lengths: item lengths in tokens, at least 1.
        capacity: pack size in tokens.
        algorithm: one of the three algorithms above.
        seed: random seed of first_fit_shuffle; the other algorithms are deterministic.

    Raises:
        ConfigError: an item is longer than a pack or shorter than 1, or the algorithm is unknown.
    """
    if algorithm not in get_args(Algorithm):
        raise ConfigError(f"algorithm: {algorithm!r} is not one of {', '.join(get_args(Algorithm))}")
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    if sizes.min() < 1:
        raise ConfigError(f"lengths: item {int(sizes.argmin())} has length {sizes.min()}; expected 1 or more")
    if sizes.max() > capacity:
        raise ConfigError(
            f"capacity: item {int(sizes.argmax())} alone has {sizes.max()} tokens, a pack has room for {capacity}; "
            "raise it or leave the item out"
        )
    if algorithm == "first_fit_shuffle":
        order = np.random.default_rng(seed).permutation(len(sizes))
        return [order[places].tolist() for places in _first_fit(sizes[order].tolist(), capacity)]
    decreasing = _first_fit_decreasing if algorithm == "first_fit_decreasing" else _best_fit_decreasing
    return decreasing(sizes, capacity)


def fill(lengths: Sequence[int] | np.ndarray, packs: Sequence[Sequence[int]], capacity: int) -> float:
    """Return the used fraction of the packs' capacity, 0 to 1."""
    return float(np.asarray(lengths)[np.concatenate([np.asarray(p) for p in packs])].sum() / (len(packs) * capacity))


# ---- first fit in a given order ---------------------------------------------------------------------------------

NEAR = 8
"""Items that are scanned linearly before the tree is searched."""


def _first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Return the item positions of each pack."""
    removed = capacity + 1  # marks an item that is already in a pack: larger than any room
    minima, leaves = _min_tree(sizes, removed)
    packs: list[list[int]] = []
    head, count = 0, len(sizes)
    while True:
        while head < count and minima[leaves + head] == removed:
            head += 1
        if head == count:
            return packs
        room, places, place, near = capacity, [], head, head + NEAR
        while room > 0:
            # Items near the head are mostly unpacked and mostly fit.
            while place < count and place < near and minima[leaves + place] > room:
                place += 1
            if place >= near or place >= count:
                place = _next_fit(minima, leaves, place, room)
                if place < 0:
                    break
            room -= minima[leaves + place]
            places.append(place)
            _remove_leaf(minima, leaves + place, removed)
            place, near = place + 1, max(near, place + 1)
        packs.append(places)


def _min_tree(sizes: list[int], padding: int) -> tuple[list[int], int]:
    """Return a binary tree as a list (node i: minimum of nodes 2i and 2i+1; leaves: sizes), and its first leaf."""
    leaves = 1 << (len(sizes) - 1).bit_length()
    level = np.full(leaves, padding, dtype=np.int64)
    level[: len(sizes)] = sizes
    levels = [level]
    while len(levels[-1]) > 1:
        levels.append(levels[-1].reshape(-1, 2).min(axis=1))
    return [padding, *np.concatenate(levels[::-1]).tolist()], leaves


def _remove_leaf(minima: list[int], node: int, removed: int) -> None:
    old, minima[node] = minima[node], removed
    while node > 1 and minima[node >> 1] == old:
        left = minima[node & -2]
        right = minima[node | 1]
        least = left if left < right else right
        node >>= 1
        if minima[node] == least:
            return
        minima[node] = least


def _next_fit(minima: list[int], leaves: int, place: int, room: int) -> int:
    """Return the first position, from `place` on, of an item of length `room` or less; -1: none."""
    if minima[1] > room or place >= leaves:
        return -1
    node = leaves + place
    while minima[node] > room:
        # Up while this is a right child, then to the neighbor on the right.
        while node & 1:
            node >>= 1
        if not node:
            return -1
        node += 1
        if not node & (node - 1):
            return -1  # beyond the right end of its level
    while node < leaves:
        node <<= 1
        if minima[node] > room:
            node += 1
    return node - leaves


# ---- decreasing lengths -----------------------------------------------------------------------------------------


def _by_length(sizes: np.ndarray) -> tuple[list[int], list[int]]:
    """Return items sorted by length, and for each length up to the longest the end of its range in this order."""
    items = np.argsort(-sizes, kind="stable")[::-1]
    ends = np.cumsum(np.bincount(sizes))
    return items.tolist(), ends.tolist()


def _first_fit_decreasing(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    items, ends = _by_length(sizes)
    starts = [0, *ends[:-1]]
    # The longest length with items left that is at most l: follow down[l] to its fixed point.
    down = [length if ends[length] > starts[length] else length - 1 for length in range(1, len(ends))]
    down = [0, *down]
    packs: list[list[int]] = []
    left, longest = len(items), len(ends) - 1
    while left:
        room, places = capacity, []
        while True:
            length = room if room < longest else longest
            while down[length] != length:
                down[length] = length = down[down[length]]
            if not length:
                break
            ends[length] -= 1
            places.append(items[ends[length]])
            room -= length
            if ends[length] == starts[length]:
                down[length] = length - 1
        left -= len(places)
        packs.append(places)
    return packs


def _best_fit_decreasing(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    items, _ = _by_length(sizes)
    lengths = sizes.tolist()
    packs: list[list[int]] = []
    # open_[r]: packs with room for r tokens. Rooms in use are bits of `words`, 64 a word; nonzero words are bits of
    # `summary`.
    open_: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    words, summary = [0] * (capacity // 64 + 1), 0
    for item in reversed(items):
        length = lengths[item]
        word = length >> 6
        candidates = words[word] >> (length & 63)
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
        else:
            rest = summary >> (word + 1)
            if rest:
                word += (rest & -rest).bit_length()
                candidates = words[word]
                room = (word << 6) + (candidates & -candidates).bit_length() - 1
            else:
                room = -1
        if room < 0:
            places: list[int] = []
            packs.append(places)
            room = capacity
        else:
            places = open_[room].pop()
            if not open_[room]:
                words[room >> 6] &= ~(1 << (room & 63))
                if not words[room >> 6]:
                    summary &= ~(1 << (room >> 6))
        places.append(item)
        room -= length
        if room:
            open_[room].append(places)
            words[room >> 6] |= 1 << (room & 63)
            summary |= 1 << (room >> 6)
    return packs
