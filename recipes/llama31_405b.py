"""Llama 3.1 405B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "llama31_405b"


def model() -> run.Config:
    """NeMo's `Llama31Config405B`."""
    return families.nemo("LlamaModel", "Llama31Config405B", vocab_size=128256)


RECIPES = families.align_recipes(
    NAME,
    "Llama 3.1 405B Instruct",
    model,
    source="hf://meta-llama/Llama-3.1-405B-Instruct",
    layout=Layout(nodes=28, tensor=8, pipeline=14, recompute=True),
    adapters=Layout(nodes=3, tensor=8, pipeline=3, recompute=True),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
