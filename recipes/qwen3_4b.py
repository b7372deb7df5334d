"""Qwen3 4B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_4b"


def model() -> run.Config:
    """NeMo's `Qwen3Config4B`."""
    return families.nemo("Qwen3Model", "Qwen3Config4B")


RECIPES = families.recipes(
    NAME,
    "Qwen3 4B",
    model,
    source="hf://Qwen/Qwen3-4B",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
