"""Qwen3 32B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_32b"


def model() -> run.Config:
    """NeMo's `Qwen3Config32B`."""
    return families.nemo("Qwen3Model", "Qwen3Config32B")


RECIPES = families.recipes(
    NAME,
    "Qwen3 32B",
    model,
    source="hf://Qwen/Qwen3-32B",
    layout=Layout(nodes=2, tensor=8, pipeline=2),
    adapters=Layout(tensor=8),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
