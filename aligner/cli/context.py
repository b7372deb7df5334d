"""Parser of commands that take a recipe: NeMo-Run's, with corrections.

NeMo-Run 0.11.1 writes YAML that it cannot read back, and exits with 0 when a job on an executor failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import nemo_run as run
from nemo_run.cli.api import RunContext

from aligner.cli import dryrun, factories
from aligner.cli.overrides import override
from aligner.cli.yaml_recipe import load_yaml
from aligner.common.errors import ConfigError


class RecipeContext(RunContext):
    """NeMo-Run's context of one command."""

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
        try:
            recipe = super().parse_fn(fn, [], **default_kwargs)
        except ValueError as error:
            if "No matching factory found" not in str(error):
                raise
            raise ConfigError(
                f"--factory: there is no {self.factory!r}; {factories.list_recipes(fn, self.factory)}"
            ) from None
        return override(recipe, args)

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        exports = any((self.to_yaml, self.to_toml, self.to_json))
        if self.executor is None or self.direct or self.repl or exports:
            super()._execute_task(fn, task_args)
            if self.dryrun and not exports:
                dryrun.check_recipe(self.parse_fn(fn, task_args), None)
            return
        from aligner import executors

        task = self.parse_fn(fn, task_args)
        run.dryrun_fn(task, executor=self.executor)
        stages: dict[str, run.Partial] = {self.name: task}
        name = str(task.log.name if hasattr(task, "log") else Path(task.output).name)
        if self.dryrun:
            executors.dryrun(stages, self.executor, name=name)
            dryrun.check_recipe(task, self.executor)
        elif self._should_continue(self.skip_confirmation):
            experiment = executors.launch(stages, self.executor, name=name, detach=self.detach)
            if self.detach:
                print(f"submitted: nemo experiment status {experiment}; nemo experiment logs {experiment} 0")
