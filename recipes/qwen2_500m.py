"""Qwen2 0.5B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen2_500m"


def model() -> run.Config:
    """NeMo's `Qwen2Config500M`."""
    return families.nemo("Qwen2Model", "Qwen2Config500M", share_embeddings_and_output_weights=True)


RECIPES = families.recipes(
    NAME,
    "Qwen2 0.5B Instruct",
    model,
    source="hf://Qwen/Qwen2-0.5B-Instruct",
    layout=Layout(),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
