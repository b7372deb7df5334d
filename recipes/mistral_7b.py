"""Mistral 7B Instruct v0.3."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "mistral_7b"


def model() -> run.Config:
    """NeMo's `MistralConfig7B`, which is of v0.1, without its window and with v0.3's rotary base."""
    return families.nemo("MistralModel", "MistralConfig7B", vocab_size=32768, window_size=None, rotary_base=1e6)


RECIPES = families.recipes(
    NAME,
    "Mistral 7B Instruct v0.3",
    model,
    source="hf://mistralai/Mistral-7B-Instruct-v0.3",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
