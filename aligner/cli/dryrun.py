"""Checks of `--dryrun`: errors of the run that arguments, sizes and file names already show."""

from __future__ import annotations

import copy
import inspect
import itertools
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run

from aligner.api import align
from aligner.checkpoint import folders, huggingface, nemo1_archive
from aligner.common.errors import AlignError
from aligner.data import prepacked, sources
from aligner.data.forms.form import Options
from aligner.data.rows import FormatCounts, PreferenceRow
from aligner.estimate import recipe_plan, report_text
from aligner.judge.self_rewarding import self_reward
from aligner.model import parallelism
from aligner.train import config_checks, summary
from aligner.train.arguments import RunArguments

FEW = 10
"""Batches of an epoch from which on it matters little that rows are left out."""


def check_recipe(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe as its run would, and print its estimated size. Commands without a recipe are not checked.

    Args:
        recipe: a `run.Partial` of `align` or `self_reward`.
        executor: executor of the run; None: this process.

    Raises:
        ConfigError, RowError: the run would raise this error.
    """
    checks = {align: _check_run, self_reward: _check_pipeline}
    if recipe.__fn_or_cls__ not in checks:
        return
    checks[recipe.__fn_or_cls__](recipe, executor)
    local = executor is None or isinstance(executor, run.LocalExecutor)
    try:
        gpu = recipe_plan.this_machine(recipe_plan.num_ranks(recipe)) if local else "h100"
        print(report_text.format_estimate(recipe, gpu))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        # A missing estimate does not refuse a recipe: devices="auto", models of other kinds.
        print(f"size not known: {error}")


def _show_forms(split: str, source: Any, data: Any) -> None:
    """Print the form of each file's rows, after a look at the first of them; a packed folder has none."""
    if prepacked.is_packed(source):
        return
    options = Options(data.ranked_pairs, tuple(data.ignore_columns))
    for parts in sources.by_name(source, f"data.{split}").values():
        for part in parts:
            print(sources.preview(part.path, options))


def _check_start(start: str) -> None:
    """Refuse initial weights that are not there or cannot be imported; what lies on a hub is not asked for."""
    if start.startswith("hf://") or nemo1_archive.is_archive(start):
        return
    if huggingface.is_importable(start) and Path(start).expanduser().is_dir():
        huggingface.check_source(start)
    elif not huggingface.is_importable(start):
        folders.resolve_checkpoint(Path(start).expanduser(), "resume.restore_config.path", verify=False)


def _show_short_run(arguments: RunArguments) -> None:
    """Print that the warm-up does not end, and how many rows fill no batch; as many rows are read as that needs."""
    data, steps = arguments.data, arguments.trainer.max_steps
    size, unpaired = data.global_batch_size, arguments.objective.kind == "unpaired"
    needed = max(config_checks.warmup_steps(arguments), FEW) * size
    if data.train and not callable(data.train) and not prepacked.is_packed(data.train):
        options = Options(data.ranked_pairs, tuple(data.ignore_columns))
        parts = [part for named in sources.by_name(data.train, "data.train").values() for part in named]
        rows = (
            row
            for part in parts
            for row in sources.rows(part.path, sources.reader_of(part.path, options), FormatCounts())
        )
        # A pair is two examples of single responses.
        sizes = (2 if unpaired and isinstance(row, PreferenceRow) else 1 for row in rows)
        found = sum(itertools.islice(sizes, needed))
        if size <= found < needed and found % size:
            by_turns = all(part.weight is None for part in parts)
            print(summary.left_out(arguments, found, "examples", by_turns=by_turns))
        steps = config_checks.num_steps(arguments, found // size)
    long_warmup = config_checks.long_warmup(arguments, steps)
    if long_warmup:
        print(long_warmup)


def _check_pipeline(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe of `self_reward` as its runs of `align` would, without the rows that stages will write.

    Raises:
        ConfigError, RowError: a stage would raise this error, or its prompts are invalid.
    """
    from aligner.data.prompts import read_for_shares, read_prompts, share

    pipeline: Any = recipe
    if pipeline.start is not None:
        _check_run(pipeline.start, executor)
    for i, iteration in enumerate(pipeline.iterations, start=1):
        # An earlier stage writes the rows, and the policy that this one starts from.
        align_stage = copy.deepcopy(iteration.align)
        align_stage.data.train = _future_rows
        start = getattr(align_stage.resume, "restore_config", None)
        if start is not None and Path(pipeline.output) in Path(start.path).parents:
            align_stage.resume.restore_config = None
        try:
            _check_run(align_stage, executor)
            if executor is None or isinstance(executor, run.LocalExecutor):
                for stage in (iteration.generate, iteration.evaluate):
                    prompts = None if stage is None else stage.prompts
                    if isinstance(prompts, fdl.Buildable) and fdl.get_callable(prompts) is share:
                        read_for_shares(prompts.source, prompts.of)
                    elif prompts is not None and not isinstance(prompts, fdl.Buildable):  # a function writes them
                        read_prompts(prompts)
        except AlignError as error:
            raise type(error)(f"iteration {i}: {error}") from None


def _future_rows() -> str:
    raise AssertionError("only checked")


def _check_run(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe of `align` as its run would, as far as arguments, sizes and file names show.

    The first rows of each file are read (`nemo llm lint-preferences` reads all), and nothing is written.

    Args:
        recipe: a `run.Partial` of `align`.
        executor: executor of the run; None: this process. Another machine may have other files and hardware.

    Raises:
        ConfigError, RowError: the run would raise this error.
    """
    init_stage: Any = getattr(getattr(recipe, "resume", None), "init_stage", None)
    if isinstance(init_stage, run.Partial):
        _check_run(init_stage, executor)
    built: Any = fdl.build(recipe)
    call = inspect.signature(align).bind(*built.args, **built.keywords)
    call.apply_defaults()
    arguments = RunArguments(**call.arguments)
    config_checks.check_arguments(arguments)
    config_checks.check_parallelism(arguments)
    if executor is None or isinstance(executor, run.LocalExecutor):
        config_checks.check_hardware(arguments)
        for split, source in (("train", arguments.data.train), ("validation", arguments.data.validation)):
            # A function writes its file when the run calls it.
            if source and not callable(source):
                _show_forms(split, source, arguments.data)
        _show_short_run(arguments)
    restore = arguments.resume.restore_config if arguments.resume else None
    if restore is not None and (executor is None or isinstance(executor, run.LocalExecutor)):
        _check_start(str(restore.path))
    if restore is None or not huggingface.is_importable(str(restore.path)):
        # The sizes of an imported model come from its config.
        parallelism.check(arguments.strategy.parallelism, arguments.model.config, ranks=arguments.num_ranks)
