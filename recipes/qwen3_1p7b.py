"""Qwen3 1.7B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_1p7b"


def model() -> run.Config:
    """NeMo's `Qwen3Config1P7B`."""
    return families.nemo("Qwen3Model", "Qwen3Config1P7B")


ALL = families.recipes(
    NAME,
    "Qwen3 1.7B",
    model,
    source="hf://Qwen/Qwen3-1.7B",
    layout=Layout(),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe, self_rewarding_recipe, meta_rewarding_recipe = ALL
