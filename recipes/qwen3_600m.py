"""Qwen3 0.6B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_600m"


def model() -> run.Config:
    """NeMo's `Qwen3Config600M`."""
    return families.nemo("Qwen3Model", "Qwen3Config600M")


ALL = families.recipes(
    NAME,
    "Qwen3 0.6B",
    model,
    source="hf://Qwen/Qwen3-0.6B",
    layout=Layout(),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe, self_rewarding_recipe, meta_rewarding_recipe = ALL
