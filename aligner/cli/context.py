"""Parser of commands that take a recipe: NeMo-Run's, with corrections.

NeMo-Run 0.11.1 writes YAML that it cannot read back, and exits with 0 when a job on an executor failed.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from pathlib import Path
from typing import Any, ClassVar

import nemo_run as run
import typer
from nemo_run.cli.api import EXECUTOR_CLASSES

from aligner.cli import dryrun, ranks
from aligner.cli.parsing import factories
from aligner.cli.parsing.entrypoint import CommandContext
from aligner.cli.parsing.overrides import check_required, override
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.cli.recipe_summary import summary
from aligner.common.console import is_first_rank
from aligner.common.errors import ConfigError


class RecipeContext(CommandContext):
    """Context of a command that takes a recipe."""

    own: ClassVar[tuple[str, ...]] = ()
    """Arguments of the command itself, which are not its recipe's."""
    recipes_of: ClassVar[tuple[str, ...]] = ()
    """Other commands whose recipes this command takes."""

    def split(self, args: list[str]) -> tuple[dict[str, str], list[str]]:
        """Split a command line into the command's own arguments (the last of each) and its recipe's."""
        own = [arg for arg in args if "=" in arg and arg.partition("=")[0] in self.own]
        return dict(arg.split("=", 1) for arg in own), [arg for arg in args if arg not in own]

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> run.Partial:
        """Return the recipe that the command line describes.

        Raises:
            ConfigError: neither a factory nor a YAML file is named, or an argument is invalid.
        """
        if self.yaml:
            return override(load_yaml(Path(self.yaml)), args)
        if not self.factory:
            raise ConfigError(
                f"--factory: missing; name a recipe, for example --factory tiny_dpo, or --yaml FILE; "
                f"{factories.list_recipes(fn)}"
            )
        recipe = factories.make(fn, self.factory, super().parse_fn)
        return override(recipe, args)

    def parse_executor(self, name: str, *args: str) -> Any:
        """Return the config of an executor.

        Raises:
            ConfigError: there is none of that name, or an argument is missing or invalid.
        """
        known = sorted({name for kind in EXECUTOR_CLASSES for name in factories.names(kind)})
        if name.partition("(")[0] not in known and "." not in name.partition("(")[0]:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"run.executor: there is no {name!r}; {hint}There are: {', '.join(known)}")
        config = override(super().parse_executor(name), list(args), within="run.executor.")
        check_required(config, self.name, within="run.executor.")
        return config

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        exports = any((self.to_yaml, self.to_toml, self.to_json))
        if self.repl or exports:
            super()._execute_task(fn, task_args)
            return
        if self.plugins:
            raise ConfigError(
                "run.plugins: plugins are not applied by this command; apply them in Python, "
                "as plugin.setup(recipe, executor), or by run.Experiment"
            )
        task = self.parse_fn(fn, task_args)
        name = str(task.log.name if hasattr(task, "log") else Path(task.output).name)
        # What is refused is said before the recipe is shown, and before a job waits in a queue.
        checked = _check(task, self.executor)
        if self.dryrun:
            self._show(task, name)
            print(checked, end="")
        else:
            self._start(task, name)

    def _show(self, task: run.Partial, name: str) -> None:
        from aligner import executors

        if self.executor is not None:
            executors.check({self.name: task}, self.executor, name=name)
        run.dryrun_fn(task, executor=self.executor)
        if self.executor is not None:
            executors.dryrun({self.name: task}, self.executor, name=name)
        elif described := ranks.describe(task):
            print(described)

    def _start(self, task: run.Partial, name: str) -> None:
        from aligner import executors

        executor = None if self.direct else self.executor or ranks.local_executor(task)
        if executor is not None:
            executors.check({self.name: task}, executor, name=name)
        if is_first_rank():
            print(summary(task, name), flush=True)
        if not self._should_continue(self.skip_confirmation):
            raise typer.Abort
        if executor is None:
            run.run(task, name=self.name, direct=True)
            return
        experiment = executors.launch({self.name: task}, executor, name=name, detach=self.detach)
        if self.detach:
            print(f"submitted: nemo experiment status {experiment}; nemo experiment logs {experiment} 0")


def _check(task: run.Partial, executor: run.Executor | None) -> str:
    """Run the checks of a dry run; return what they print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        dryrun.check_recipe(task, executor)
    return printed.getvalue()
