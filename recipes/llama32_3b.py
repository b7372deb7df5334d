"""Llama 3.2 3B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "llama32_3b"


def model() -> run.Config:
    """NeMo's `Llama32Config3B`."""
    return families.nemo("LlamaModel", "Llama32Config3B", vocab_size=128256)


RECIPES = families.recipes(
    NAME,
    "Llama 3.2 3B Instruct",
    model,
    source="hf://meta-llama/Llama-3.2-3B-Instruct",
    layout=Layout(),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
