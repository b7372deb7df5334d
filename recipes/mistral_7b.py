"""Mistral 7B Instruct v0.3."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "mistral_7b"


def model() -> run.Config:
    """NeMo's `MistralConfig7B`."""
    return families.nemo("MistralModel", "MistralConfig7B")


ALL = families.recipes(
    NAME,
    "Mistral 7B Instruct v0.3",
    model,
    source="hf://mistralai/Mistral-7B-Instruct-v0.3",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe, self_rewarding_recipe, meta_rewarding_recipe = ALL
