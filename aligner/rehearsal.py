"""What a dry run finds out: that the run itself would refuse what it is given."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import fiddle as fdl
import nemo_run as run

from aligner import checks, huggingface, layout, sources
from aligner.api import align
from aligner.engine import Run
from aligner.errors import AlignError


def rehearse_rounds(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe of `self_reward` as its runs of `align` would, so far as their rows need not be there.

    Raises:
        ConfigError, RowError: what a stage would say, or its prompts.
    """
    from aligner.prompts import read_prompts

    asked: Any = recipe
    if asked.start is not None:
        rehearse(asked.start, executor)
    for i, one in enumerate(asked.rounds, start=1):
        # The stage before makes the rows.
        later = copy.deepcopy(one.align)
        later.data.train = _rows_to_come
        try:
            rehearse(later, executor)
            if executor is None or isinstance(executor, run.LocalExecutor):
                for stage in (one.generate, one.evaluate):
                    if stage is not None and not isinstance(stage.prompts, fdl.Buildable):  # a function makes them
                        read_prompts(stage.prompts)
        except AlignError as error:
            raise type(error)(f"iteration {i}: {error}") from None


def _rows_to_come() -> str:
    raise AssertionError("only rehearsed")


def rehearse(recipe: run.Partial, executor: run.Executor | None) -> None:
    """Refuse a recipe of `align` as its run would, so far as arguments, sizes and the names of files tell.

    Rows are not read: `nemo llm lint-preferences` does. Nothing is written.

    Args:
        recipe: a `run.Partial` of `align`.
        executor: where; None: in this process. Another machine may have other files and other hardware than this one.

    Raises:
        ConfigError, RowError: what the run would say.
    """
    before: Any = getattr(getattr(recipe, "resume", None), "start_from", None)
    if isinstance(before, run.Partial):
        rehearse(before, executor)
    built: Any = fdl.build(recipe)
    call = inspect.signature(align).bind(*built.args, **built.keywords)
    call.apply_defaults()
    planned = Run(**call.arguments)
    checks.arguments(planned)
    checks.layout(planned)
    if executor is None:
        checks.started(planned)
    if executor is None or isinstance(executor, run.LocalExecutor):
        checks.machine(planned)
        for split, source in (("train", planned.data.train), ("validation", planned.data.validation)):
            # A function makes its file when the run asks for it.
            if source and not callable(source):
                sources.parts(source, f"data.{split}")
    restore = planned.resume.restore_config if planned.resume else None
    if restore is None or not huggingface.is_source(str(restore.path)):
        # An imported model says itself how large it is.
        ranks = planned.trainer.num_nodes * planned.trainer.num_devices
        layout.check(planned.strategy.parallelism, planned.model.config, ranks=ranks)
