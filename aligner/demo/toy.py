"""Toy data: sums, with preferences for correct results.

Rows are generated, not shipped: "17+5=" with the correct sum chosen and a wrong one rejected, and rewards that decrease
with the distance from the correct sum. Training and validation rows share no sum.
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
"""Minimum distance of a wrong answer from the correct sum."""
Split = Literal["train", "validation", "demonstrations", "careless"]


def tokenizer() -> object:
    """Load the demo's character tokenizer (digits, letters, some punctuation), which the package includes."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(str(TOKENIZER))


def arithmetic(
    dir: str, split: Literal["train", "validation", "demonstrations", "careless"], rows: int, seed: int = 7
) -> str:
    """Write rows of sums and return the file's path.

    "demonstrations" are single responses for supervised fine-tuning, half of them correct: the model learns the format
    of responses, not the preference. "careless" responses omit the carry of the units in three of five cases that have
    one: the trained model can produce the correct answer but mostly gives the other.
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
            omits_carry = a % 10 + b % 10 > 9 and draw.random() < 0.6
            row |= {"response": str(a + b - 10 * omits_carry)}
        else:
            row |= {"chosen_response": str(a + b), "rejected_response": str(wrong)}
            row |= {"chosen_reward": 1.0, "rejected_reward": round(1 - abs(wrong - a - b) / 10, 1)}
        lines.append(json.dumps(row))
    path = Path(dir).expanduser() / f"arithmetic-{split}-{rows}-{seed}.jsonl"
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
    return str(path)


def prompts(dir: str, split: Literal["train", "validation"], seed: int = 7) -> str:
    """Write each sum of a split once, with its `answer`, and return the file's path."""
    pool, path = _sums(split, seed), Path(dir).expanduser() / f"sums-{split}-{seed}.jsonl"
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": a + b}) + "\n" for a, b in pool))
    return str(path)


def _sums(split: str, seed: int) -> list[tuple[int, int]]:
    """Return the sums of a split; one in five belongs to validation."""
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(sums)
    num_validation = len(sums) // 5
    return sums[:num_validation] if split == "validation" else sums[num_validation:]
