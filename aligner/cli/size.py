"""`nemo llm size`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from aligner.cli.context import RecipeContext
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.estimate.memory import GPUS
from aligner.estimate.recipe_plan import training_recipe
from aligner.estimate.report_text import format_estimate

HELP = f"""Estimate GPU memory, step time and GPU-hours of a recipe by arithmetic; nothing is run.

nemo llm size --factory llama3_70b_dpo trainer.num_nodes=4

nemo llm size --factory llama3_8b_dpo gpu=h200 mfu=0.35 tokens=900 data.train=train.jsonl

gpu= [h100]  one of {", ".join(GPUS)}

mfu= [0.4]  model FLOPs utilization: share of a GPU's peak, pipeline bubbles excluded

tokens=  average tokens of a sequence (prompt and response); default: from data.train=FILE at four characters per token,
or data.seq_length if no file is named

everything else is as in nemo llm align, or in nemo llm self-reward, of which the first iteration is estimated
"""


def size() -> None:
    """Estimate memory, step time and GPU-hours of a recipe."""


class SizeContext(RecipeContext):
    """Context that parses `gpu=`, `mfu=` and `tokens=`, and the rest as the command that would run the recipe."""

    own = ("gpu", "mfu", "tokens")
    recipes_of = ("align", "self-reward")

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        from aligner.api import align
        from aligner.cli.parsing import factories
        from aligner.cli.stage_contexts import PipelineContext
        from aligner.judge.self_rewarding import self_reward

        own, rest = self.split(task_args)
        is_pipeline = (self.factory or "").partition("(")[0] in factories.names(self_reward)
        if self.yaml:
            is_pipeline = load_yaml(Path(self.yaml)).__fn_or_cls__ is self_reward
        context, command = (PipelineContext, self_reward) if is_pipeline else (RecipeContext, align)
        recipe = context(name=self.name, factory=self.factory, yaml=self.yaml).parse_fn(command, rest)
        named = (self.factory or "").partition("(")[2] + " ".join(rest)
        if not self.yaml and not re.search(r"\btrain=", named):
            # A file of the recipe's default name may be about something else.
            training_recipe(recipe).data.train = None
        print(format_estimate(recipe, **own))
