"""`nemo llm size`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligner.cli.context import RecipeContext
from aligner.cli.yaml_recipe import load_yaml
from aligner.estimate.memory import GPUS
from aligner.estimate.report_text import format_estimate

HELP = f"""Memory of a GPU, time of a step and GPU-hours of a recipe, by arithmetic; nothing is run.

nemo llm size --factory llama3_70b_dpo trainer.num_nodes=4

nemo llm size --factory llama3_8b_dpo gpu=h200 mfu=0.35 tokens=900 data.train=train.jsonl

gpu= [h100]  one of {", ".join(GPUS)}

mfu= [0.4]  share of its peak that a GPU reaches while it does not wait for a pipeline

tokens=  of a sequence (prompt and response) on average; else those of data.train, at four characters a token, or if
that is no file data.seq_length

everything else is as in nemo llm align, or nemo llm self-reward, whose first round is looked at
"""


def size() -> None:
    """What a recipe takes."""


class SizeContext(RecipeContext):
    """Reads `gpu=`, `mfu=` and `tokens=` for itself and the rest as the command that would run the recipe."""

    own = ("gpu", "mfu", "tokens")
    recipes_of = ("align", "self-reward")

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        from aligner.api import align
        from aligner.cli import factories
        from aligner.cli.stage_contexts import PipelineContext
        from aligner.judge.self_rewarding import self_reward

        own, rest = self.split(task_args)
        of_rounds = (self.factory or "").partition("(")[0] in factories.names(self_reward)
        if self.yaml:
            of_rounds = load_yaml(Path(self.yaml)).__fn_or_cls__ is self_reward
        reader, command = (PipelineContext, self_reward) if of_rounds else (RecipeContext, align)
        recipe = reader(name=self.name, factory=self.factory, yaml=self.yaml).parse_fn(command, rest)
        print(format_estimate(recipe, **own))
