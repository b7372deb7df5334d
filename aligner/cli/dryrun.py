"""Checks of `--dryrun`: what the run itself would refuse, as far as arguments, sizes and names of files tell."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import fiddle as fdl
import nemo_run as run

from aligner.api import align
from aligner.checkpoint import huggingface
from aligner.common.errors import AlignError
from aligner.data import sources
from aligner.estimate import recipe_plan, report_text
from aligner.judge.self_rewarding import self_reward
from aligner.model import parallelism
from aligner.train import config_checks
from aligner.train.arguments import RunArguments


def check_recipe(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe as its run would, and print its estimated size. Commands that take no recipe are let through.

    Args:
        recipe: a `run.Partial` of `align` or `self_reward`.
        executor: None: in this process.

    Raises:
        ConfigError, RowError: as the run would.
    """
    checks = {align: _check_run, self_reward: _check_pipeline}
    if recipe.__fn_or_cls__ not in checks:
        return
    checks[recipe.__fn_or_cls__](recipe, executor)
    here = executor is None or isinstance(executor, run.LocalExecutor)
    try:
        gpu = recipe_plan.this_machine(recipe_plan.num_ranks(recipe)) if here else "h100"
        print(report_text.format_estimate(recipe, gpu))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        # A recipe is not refused for an estimate's sake: devices="auto", models of other kinds.
        print(f"size not known: {error}")


def _check_pipeline(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe of `self_reward` as its runs of `align` would, so far as their rows need not be there.

    Raises:
        ConfigError, RowError: what a stage would say, or its prompts.
    """
    from aligner.data.prompts import read_prompts

    asked: Any = recipe
    if asked.start is not None:
        _check_run(asked.start, executor)
    for i, one in enumerate(asked.iterations, start=1):
        # The stage before makes the rows.
        later = copy.deepcopy(one.align)
        later.data.train = _rows_to_come
        try:
            _check_run(later, executor)
            if executor is None or isinstance(executor, run.LocalExecutor):
                for stage in (one.generate, one.evaluate):
                    if stage is not None and not isinstance(stage.prompts, fdl.Buildable):  # a function makes them
                        read_prompts(stage.prompts)
        except AlignError as error:
            raise type(error)(f"iteration {i}: {error}") from None


def _rows_to_come() -> str:
    raise AssertionError("only checked")


def _check_run(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe of `align` as its run would, so far as arguments, sizes and the names of files tell.

    Rows are not read: `nemo llm lint-preferences` does. Nothing is written.

    Args:
        recipe: a `run.Partial` of `align`.
        executor: where; None: in this process. Another machine may have other files and other hardware than this one.

    Raises:
        ConfigError, RowError: what the run would say.
    """
    before: Any = getattr(getattr(recipe, "resume", None), "init_stage", None)
    if isinstance(before, run.Partial):
        _check_run(before, executor)
    built: Any = fdl.build(recipe)
    call = inspect.signature(align).bind(*built.args, **built.keywords)
    call.apply_defaults()
    planned = RunArguments(**call.arguments)
    config_checks.check_arguments(planned)
    config_checks.check_parallelism(planned)
    if executor is None:
        config_checks.check_world_size(planned)
    if executor is None or isinstance(executor, run.LocalExecutor):
        config_checks.check_hardware(planned)
        for split, source in (("train", planned.data.train), ("validation", planned.data.validation)):
            # A function makes its file when the run asks for it.
            if source and not callable(source):
                sources.resolve_files(source, f"data.{split}")
    restore = planned.resume.restore_config if planned.resume else None
    if restore is None or not huggingface.is_importable(str(restore.path)):
        # An imported model says itself how large it is.
        parallelism.check(planned.strategy.parallelism, planned.model.config, ranks=planned.num_ranks)
