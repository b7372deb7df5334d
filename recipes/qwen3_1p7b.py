"""Qwen3 1.7B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_1p7b"


def model() -> run.Config:
    """NeMo's `Qwen3Config1P7B`."""
    return families.nemo("Qwen3Model", "Qwen3Config1P7B")


RECIPES = families.recipes(
    NAME,
    "Qwen3 1.7B",
    model,
    source="hf://Qwen/Qwen3-1.7B",
    layout=Layout(),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
