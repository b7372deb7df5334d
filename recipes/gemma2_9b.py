"""Gemma 2 9B IT."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "gemma2_9b"


def model() -> run.Config:
    """NeMo's `Gemma2Config9B`."""
    return families.nemo("Gemma2Model", "Gemma2Config9B")


RECIPES = families.align_recipes(
    NAME,
    "Gemma 2 9B IT",
    model,
    source="hf://google/gemma-2-9b-it",
    layout=Layout(tensor=4),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
