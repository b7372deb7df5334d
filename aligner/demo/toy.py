"""The demo's world: sums, a calculator that is right half of the time, and a preference for being right.

Rows are made, not shipped: "17+5=" with the right sum chosen and a wrong one rejected, and rewards that fall with the
distance from the right one. No sum of the held-out rows occurs in the training rows.
"""

import json
import random
from pathlib import Path
from typing import Literal

from aligner.common.files import atomic_write

TOKENIZER = Path(__file__).parent / "tiny-tokenizer"
LARGEST = 19
"""Largest summand."""
NEAREST = 3
"""How far a wrong answer is off, at least."""
Split = Literal["train", "validation", "demonstrations", "careless"]


def tokenizer() -> object:
    """A tokenizer of single characters (digits, letters, a few signs), shipped with the package."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(str(TOKENIZER))


def arithmetic(
    dir: str, split: Literal["train", "validation", "demonstrations", "careless"], rows: int, seed: int = 7
) -> str:
    """Write rows about sums and return the file's path.

    "demonstrations" are single answers for a first stage of supervised fine-tuning, right in one case out of two, so
    that the model learns what answers look like and not which to prefer. "careless" ones forget the carry of the units
    in three cases out of five: a model that learns from them knows the right answer, and mostly gives the other.
    """
    pool, draw = _sums(split, seed), random.Random(f"{seed} {split}")
    lines = []
    for _ in range(rows):
        a, b = draw.choice(pool)
        wrong = draw.choice([n for n in range(2 * LARGEST + 1) if abs(n - a - b) >= NEAREST])
        row: dict[str, object] = {"prompt": f"{a}+{b}="}
        if split == "demonstrations":
            row |= {"response": str(draw.choice([a + b, wrong]))}
        elif split == "careless":
            forgotten = a % 10 + b % 10 > 9 and draw.random() < 0.6
            row |= {"response": str(a + b - 10 * forgotten)}
        else:
            row |= {"chosen_response": str(a + b), "rejected_response": str(wrong)}
            row |= {"chosen_reward": 1.0, "rejected_reward": round(1 - abs(wrong - a - b) / 10, 1)}
        lines.append(json.dumps(row))
    path = Path(dir).expanduser() / f"arithmetic-{split}-{rows}-{seed}.jsonl"
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
    return str(path)


def prompts(dir: str, split: Literal["train", "validation"], seed: int = 7) -> str:
    """Write every sum of a split once, with its `answer`, and return the file's path."""
    pool, path = _sums(split, seed), Path(dir).expanduser() / f"sums-{split}-{seed}.jsonl"
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": a + b}) + "\n" for a, b in pool))
    return str(path)


def _sums(split: str, seed: int) -> list[tuple[int, int]]:
    """The sums of a split; one in five is held out for validation."""
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(sums)
    held_out = len(sums) // 5
    return sums[:held_out] if split == "validation" else sums[held_out:]
