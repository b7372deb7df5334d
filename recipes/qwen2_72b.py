"""Qwen2 72B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen2_72b"


def model() -> run.Config:
    """NeMo's `Qwen2Config72B`."""
    return families.nemo("Qwen2Model", "Qwen2Config72B")


RECIPES = families.recipes(
    NAME,
    "Qwen2 72B Instruct",
    model,
    source="hf://Qwen/Qwen2-72B-Instruct",
    layout=Layout(nodes=4, tensor=8, pipeline=4),
    adapters=Layout(tensor=8),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
