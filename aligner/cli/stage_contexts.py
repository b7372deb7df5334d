"""Command lines of `nemo llm self-reward` and of the commands of its stages."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import nemo_run as run

from aligner.cli.context import RecipeContext
from aligner.cli.parsing.overrides import check_required, override
from aligner.common.errors import ConfigError
from aligner.judge.self_rewarding import Iteration

STAGES = tuple(part.name for part in fields(Iteration))


class StageContext(RecipeContext):
    """Context of one stage, `generate-responses` for example; a stage has arguments and needs no recipe."""

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> run.Partial:
        """Return the stage that the command line describes.

        Raises:
            ConfigError: an argument is invalid or missing.
        """
        if self.yaml or self.factory:
            return super().parse_fn(fn, args, **default_kwargs)
        stage = override(run.Partial(fn), args)
        check_required(stage, self.name)
        return stage


class PipelineContext(RecipeContext):
    """Context in which `align.loss.beta=0.2` applies to every iteration; `start.` to the run before them."""

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> run.Partial:
        """Return the recipe that the command line describes.

        Raises:
            ConfigError: an argument is invalid.
        """
        of_stages = [arg for arg in args if arg.partition("=")[0].partition(".")[0] in (*STAGES, "start")]
        recipe: Any = super().parse_fn(fn, [arg for arg in args if arg not in of_stages], **default_kwargs)
        # Parts are set before their fields, in whatever order the user typed them.
        for arg in sorted(of_stages, key=lambda arg: arg.partition("=")[0].count(".")):
            name, dot, rest = arg.partition(".")
            holders = [recipe] if name == "start" else recipe.iterations
            if not dot or all(getattr(holder, name, None) is None for holder in holders):
                raise ConfigError(f"{arg.partition('=')[0]}: this recipe has nothing of that to set")
            for holder in holders:
                part = getattr(holder, name)
                if part is None:  # a stage that not every iteration has
                    continue
                # `judge.` sets the judge, not the stage around it, and the judge is the same in all stages.
                if name == "judge":
                    for stage in filter(None, (part, holder.meta_judge, holder.evaluate)):
                        stage.judge = override(stage.judge, [rest])
                else:
                    setattr(holder, name, override(part, [rest]))
                # All stages of an iteration are about the same prompts.
                if arg.startswith("generate.prompts="):
                    for stage in filter(None, (holder.judge, holder.meta_judge, holder.select)):
                        stage.prompts = holder.generate.prompts
        return recipe
