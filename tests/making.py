"""Rows of sums, and a run of a model of two layers on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_rows(path: Path, count: int, seed: int = 0, longest: int = 6) -> Path:
    """Sums with answers of very unequal length; some are one character, some differ at their first token."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        wrong = draw.choice(["?", "no idea", "it is " + "so " * draw.randint(1, longest) + str(a * b)])
        lines.append(json.dumps({"prompt": f"{a}+{b}=", "chosen_response": str(a + b), "rejected_response": wrong}))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_tiny(tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a `dpo_recipe` of a model of two layers, on 16 + 6 rows, without an SFT stage."""

    def recipe(name: str = "run", rows: int = 16, held_out: int = 6, **options: Any) -> Any:
        from aligner.recipes import tiny_llama

        train = write_rows(tmp_path / f"train{rows}.jsonl", rows)
        valid = write_rows(tmp_path / f"valid{held_out}.jsonl", held_out, seed=1) if held_out else None
        made = tiny_llama.dpo_recipe(
            dir=str(tmp_path / "runs"),
            name=name,
            train=str(train),
            validation=str(valid) if valid else None,
            **options,
        )
        made.resume.init_stage = None
        made.model.config.num_layers = 2
        made.model.config.hidden_size = 64
        made.model.config.ffn_hidden_size = 96
        made.data.global_batch_size, made.data.micro_batch_size = 4, 2
        made.trainer.max_steps = 4
        made.trainer.val_check_interval = 2
        made.log.ckpt.every_n_train_steps = 2
        return made

    return recipe
