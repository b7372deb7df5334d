"""Qwen2 7B Instruct."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen2_7b"


def model() -> run.Config:
    """NeMo's `Qwen2Config7B`."""
    return families.nemo("Qwen2Model", "Qwen2Config7B")


ALL = families.recipes(
    NAME,
    "Qwen2 7B Instruct",
    model,
    source="hf://Qwen/Qwen2-7B-Instruct",
    layout=Layout(tensor=2),
    adapters=Layout(),
)
sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe, self_rewarding_recipe, meta_rewarding_recipe = ALL
