"""Packing a million lengths: seconds and fill of each algorithm, beside a plain first fit and NeMo's own, in one run.

    python benchmarks/packing.py [ITEMS]

Lengths are lognormal (mu 6.6, sigma 0.8), clipped to 8..8192, into packs of 8192 tokens. NeMo's function and the
plain one take time that grows with the square of the number, so they get fewer items, and ours the same few beside
them.
"""

import sys
import time
from collections.abc import Callable
from typing import get_args

import numpy as np

from aligner.data.packing import Algorithm, pack

CAPACITY = 8192
FEW = 20_000


def lengths(count: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(6.6, 0.8, count)
    return drawn.clip(8, CAPACITY).astype(int)


def plain_first_fit(sizes: np.ndarray) -> list[list[int]]:
    """The rule as it is told, one pack after the other looked at."""
    room: list[int] = []
    packs: list[list[int]] = []
    for item, size in enumerate(sizes.tolist()):
        for number, left in enumerate(room):
            if left >= size:
                room[number] -= size
                packs[number].append(item)
                break
        else:
            room.append(CAPACITY - size)
            packs.append([item])
    return packs


def nemo(algorithm: str) -> Callable[[np.ndarray], list[list[int]]]:
    """NeMo's packing; it gives lengths back, which stand for the items here."""
    from nemo.utils import sequence_packing_utils as utils

    def packed(sizes: np.ndarray) -> list[list[int]]:
        return getattr(utils, algorithm)(sizes.tolist(), CAPACITY)

    return packed


def timed(name: str, sizes: np.ndarray, make: Callable[[np.ndarray], list[list[int]]]) -> float:
    began = time.perf_counter()
    packs = make(sizes)
    seconds = time.perf_counter() - began
    full = float(sizes.sum()) / (len(packs) * CAPACITY)
    print(f"{name:<44}{len(sizes):>10,}{seconds:>10.2f} s{full:>10.3%}{len(packs):>10,} packs", flush=True)
    return seconds


def main(count: int) -> None:
    many, few = lengths(count), lengths(FEW)
    for algorithm in get_args(Algorithm):
        timed(f"aligner {algorithm}", many, lambda sizes, a=algorithm: pack(sizes, CAPACITY, algorithm=a))
    ours = {
        a: timed(f"aligner {a}", few, lambda sizes, a=a: pack(sizes, CAPACITY, algorithm=a))
        for a in get_args(Algorithm)
    }
    theirs = {a: timed(f"NeMo {a}", few, nemo(a)) for a in ("first_fit_shuffle", "first_fit_decreasing")}
    plain = timed("plain first fit, as they come", few, plain_first_fit)
    for algorithm, seconds in theirs.items():
        print(f"{algorithm}: NeMo takes {seconds / ours[algorithm]:.0f} times as long on {FEW:,} items")
    print(f"plain first fit takes {plain / ours['first_fit_shuffle']:.0f} times as long as ours, shuffled")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
