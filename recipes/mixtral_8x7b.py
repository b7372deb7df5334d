"""Mixtral 8x7B Instruct v0.1."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "mixtral_8x7b"


def model() -> run.Config:
    """NeMo's `MixtralConfig8x7B`."""
    return families.nemo("MixtralModel", "MixtralConfig8x7B", vocab_size=32000)


RECIPES = families.recipes(
    NAME,
    "Mixtral 8x7B Instruct v0.1",
    model,
    source="hf://mistralai/Mixtral-8x7B-Instruct-v0.1",
    layout=Layout(nodes=4, tensor=4, pipeline=2, expert=4, generation_tensor=8),
    adapters=Layout(tensor=2, expert=4, generation_tensor=8),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
