"""Gemma 2 27B IT."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "gemma2_27b"


def model() -> run.Config:
    """NeMo's `Gemma2Config27B`."""
    return families.nemo("Gemma2Model", "Gemma2Config27B")


ALL = families.recipes(
    NAME,
    "Gemma 2 27B IT",
    model,
    source="hf://google/gemma-2-27b-it",
    layout=Layout(nodes=2, tensor=8, pipeline=2),
    adapters=Layout(tensor=4),
)
sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe, self_rewarding_recipe, meta_rewarding_recipe = ALL
