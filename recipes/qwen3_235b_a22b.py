"""Qwen3 235B-A22B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_235b_a22b"


def model() -> run.Config:
    """NeMo's `Qwen3Config235B_A22B`."""
    return families.nemo("Qwen3Model", "Qwen3Config235B_A22B")


RECIPES = families.align_recipes(
    NAME,
    "Qwen3 235B-A22B",
    model,
    source="hf://Qwen/Qwen3-235B-A22B",
    layout=Layout(nodes=16, tensor=4, pipeline=2, expert=64, recompute=True),
    adapters=Layout(nodes=2, tensor=4, pipeline=2, expert=8, recompute=True),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
