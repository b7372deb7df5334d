"""Llama 2 7B Chat."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "llama2_7b"


def model() -> run.Config:
    """NeMo's `Llama2Config7B`."""
    return families.nemo("LlamaModel", "Llama2Config7B", vocab_size=32000)


RECIPES = families.recipes(
    NAME,
    "Llama 2 7B Chat",
    model,
    source="hf://meta-llama/Llama-2-7b-chat-hf",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
