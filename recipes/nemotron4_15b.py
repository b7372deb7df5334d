"""Nemotron-4 15B Base."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "nemotron4_15b"


def model() -> run.Config:
    """NeMo's `Nemotron4Config15B`."""
    return families.nemo("NemotronModel", "Nemotron4Config15B", vocab_size=256000)


RECIPES = families.recipes(
    NAME,
    "Nemotron-4 15B Base",
    model,
    source="hf://thhaus/nemotron4-15b-base-hf",
    layout=Layout(tensor=4),
    adapters=Layout(tensor=2),
    apply_chat_template=False,
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
