"""Llama 3.1 70B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "llama31_70b"


def model() -> run.Config:
    """NeMo's `Llama31Config70B`."""
    return families.nemo("LlamaModel", "Llama31Config70B", vocab_size=128256)


RECIPES = families.recipes(
    NAME,
    "Llama 3.1 70B Instruct",
    model,
    source="hf://meta-llama/Llama-3.1-70B-Instruct",
    layout=Layout(nodes=4, tensor=8, pipeline=4),
    adapters=Layout(tensor=8),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
