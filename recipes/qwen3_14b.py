"""Qwen3 14B."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "qwen3_14b"


def model() -> run.Config:
    """NeMo's `Qwen3Config14B`."""
    return families.nemo("Qwen3Model", "Qwen3Config14B")


ALL = families.recipes(
    NAME,
    "Qwen3 14B",
    model,
    source="hf://Qwen/Qwen3-14B",
    layout=Layout(tensor=8),
    adapters=Layout(tensor=2),
)
sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe, self_rewarding_recipe, meta_rewarding_recipe = ALL
