"""Nemotron-4 340B Base."""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "nemotron4_340b"


def model() -> run.Config:
    """NeMo's `Nemotron4Config340B`."""
    return families.nemo("NemotronModel", "Nemotron4Config340B", vocab_size=256000)


RECIPES = families.align_recipes(
    NAME,
    "Nemotron-4 340B Base",
    model,
    source="hf://mgoin/Nemotron-4-340B-Base-hf",
    layout=Layout(nodes=24, tensor=8, pipeline=12, recompute=True),
    adapters=Layout(nodes=4, tensor=8, pipeline=4, recompute=True),
    apply_chat_template=False,
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
