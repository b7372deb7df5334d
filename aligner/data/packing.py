"""Which items share a pack: bin packing of lengths, near linear in time.

    first_fit_shuffle        items in random order, each into the first pack that has room
    first_fit_decreasing     the longest first, each into the first pack that has room
    best_fit_decreasing      the longest first, each into the fullest pack that has room

First fit is computed pack by pack: what the rule puts into the first pack is what a walk over all items puts there
that takes whatever still fits, and so on with the items left over. With items in decreasing order the walk needs no
more than the longest item that fits; in any other order a tree of minima finds the next one.

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
    """Indices of the items in each pack: every index once, no pack longer than `capacity`.

    Args:
        lengths: of the items, tokens, at least 1 each.
        capacity: of a pack, tokens.
        algorithm: one of the three above.
        seed: of the order of first_fit_shuffle; the others draw nothing.

    Raises:
        ConfigError: an item alone is longer than a pack (its index is named), or there is no such algorithm.
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
    """Share of the packs' room that is taken, 0 to 1."""
    return float(np.asarray(lengths)[np.concatenate([np.asarray(p) for p in packs])].sum() / (len(packs) * capacity))


# ---- first fit in a given order ---------------------------------------------------------------------------------

NEAR = 8
"""Items that are looked at one by one before the tree is asked."""


def _first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Places of the items in each pack."""
    taken = capacity + 1  # stands for an item that is in a pack: no room is so large
    minima, leaves = _minima(sizes, taken)
    packs: list[list[int]] = []
    head, count = 0, len(sizes)
    while True:
        while head < count and minima[leaves + head] == taken:
            head += 1
        if head == count:
            return packs
        room, places, place, near = capacity, [], head, head + NEAR
        while room > 0:
            # What lies near the head is mostly there and mostly fits.
            while place < count and place < near and minima[leaves + place] > room:
                place += 1
            if place >= near or place >= count:
                place = _next_fit(minima, leaves, place, room)
                if place < 0:
                    break
            room -= minima[leaves + place]
            places.append(place)
            _remove(minima, leaves + place, taken)
            place, near = place + 1, max(near, place + 1)
        packs.append(places)


def _minima(sizes: list[int], beyond: int) -> tuple[list[int], int]:
    """A binary tree in a list: node i holds the least of nodes 2i and 2i+1, leaves the sizes; and its first leaf."""
    leaves = 1 << (len(sizes) - 1).bit_length()
    level = np.full(leaves, beyond, dtype=np.int64)
    level[: len(sizes)] = sizes
    levels = [level]
    while len(levels[-1]) > 1:
        levels.append(levels[-1].reshape(-1, 2).min(axis=1))
    return [beyond, *np.concatenate(levels[::-1]).tolist()], leaves


def _remove(minima: list[int], node: int, gone: int) -> None:
    old, minima[node] = minima[node], gone
    while node > 1 and minima[node >> 1] == old:
        left = minima[node & -2]
        right = minima[node | 1]
        least = left if left < right else right
        node >>= 1
        if minima[node] == least:
            return
        minima[node] = least


def _next_fit(minima: list[int], leaves: int, place: int, room: int) -> int:
    """The first place from `place` on whose item is no longer than `room`; -1: none."""
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
    """Items sorted by length, and for each length up to the longest the end of its run among them."""
    items = np.argsort(-sizes, kind="stable")[::-1]
    ends = np.cumsum(np.bincount(sizes))
    return items.tolist(), ends.tolist()


def _first_fit_decreasing(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    items, ends = _by_length(sizes)
    starts = [0, *ends[:-1]]
    # The longest length that still has items and is no longer than l: follow down[l] until it stays.
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
    # open[r]: packs with room for r tokens; the rooms that occur are bits of `words`, 64 a word, and its words that
    # are not 0 are bits of `summary`.
    open_: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    words, summary = [0] * (capacity // 64 + 1), 0
    for item in reversed(items):
        length = lengths[item]
        word = length >> 6
        found = words[word] >> (length & 63)
        if found:
            room = length + (found & -found).bit_length() - 1
        else:
            rest = summary >> (word + 1)
            if rest:
                word += (rest & -rest).bit_length()
                found = words[word]
                room = (word << 6) + (found & -found).bit_length() - 1
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
