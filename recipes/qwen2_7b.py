"""Qwen2 7B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen2_7b"


def model() -> run.Config:
    """NeMo's `Qwen2Config7B`."""
    return families.nemo("Qwen2Model", "Qwen2Config7B")


RECIPES = families.recipes(
    NAME,
    "Qwen2 7B Instruct",
    model,
    source="hf://Qwen/Qwen2-7B-Instruct",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
