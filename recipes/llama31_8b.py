"""Llama 3.1 8B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "llama31_8b"


def model() -> run.Config:
    """NeMo's `Llama31Config8B`."""
    return families.nemo("LlamaModel", "Llama31Config8B", vocab_size=128256)


RECIPES = families.recipes(
    NAME,
    "Llama 3.1 8B Instruct",
    model,
    source="hf://meta-llama/Llama-3.1-8B-Instruct",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
