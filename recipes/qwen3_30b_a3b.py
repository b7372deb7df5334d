"""Qwen3 30B-A3B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_30b_a3b"


def model() -> run.Config:
    """NeMo's `Qwen3Config30B_A3B`."""
    return families.nemo("Qwen3Model", "Qwen3Config30B_A3B")


RECIPES = families.recipes(
    NAME,
    "Qwen3 30B-A3B",
    model,
    source="hf://Qwen/Qwen3-30B-A3B",
    layout=Layout(nodes=2, tensor=4, pipeline=2, expert=4),
    adapters=Layout(tensor=4, expert=4),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
