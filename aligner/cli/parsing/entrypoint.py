"""Commands of `nemo llm`: NeMo-Run's, with options that say what they do, and errors on one line."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import nemo_run as run
import typer
from nemo_run.cli.api import Entrypoint, RunContext

from aligner.cli.parsing import refusals
from aligner.cli.parsing.overrides import arguments_of, check_required, override
from aligner.common.errors import ConfigError

OPTIONS: dict[str, Any] = {
    "run_name": typer.Option(None, "--name", "-n", hidden=True),
    "direct": typer.Option(False, "--direct/--no-direct", help="Run in this process, whatever the executor"),
    "dryrun": typer.Option(False, "--dryrun", help="Check and show what would run; nothing is started or written"),
    "factory": typer.Option(None, "--factory", "-f", help="Recipe to run, MODEL_METHOD or module.function"),
    "load": typer.Option(None, "--load", hidden=True),
    "yaml": typer.Option(None, "--yaml", help="Recipe to run, as a file that --to-yaml wrote"),
    "repl": typer.Option(False, "--repl", "-r", help="Open IPython with the recipe as `task`"),
    "detach": typer.Option(False, "--detach", help="Submit to Slurm and return"),
    "skip_confirmation": typer.Option(False, "--yes", "-y", "--no-confirm", help="Do not ask before starting"),
    "tail_logs": typer.Option(False, "--tail-logs/--no-tail-logs", hidden=True),
    "verbose": typer.Option(False, "-v", "--verbose", hidden=True),
    "rich_exceptions": typer.Option(False, "--rich-exceptions/--no-rich-exceptions", hidden=True),
    "rich_traceback": typer.Option(False, "--rich-traceback-short/--rich-traceback-full", hidden=True),
    "rich_locals": typer.Option(True, "--rich-show-locals/--rich-hide-locals", hidden=True),
    "rich_theme": typer.Option(None, "--rich-theme", hidden=True),
    "to_yaml": typer.Option(None, "--to-yaml", help="Write the recipe to a YAML file; nothing is started"),
    "to_toml": typer.Option(None, "--to-toml", help="Write the recipe to a TOML file; nothing is started"),
    "to_json": typer.Option(None, "--to-json", help="Write the recipe to a JSON file; nothing is started"),
}
"""NeMo-Run's options. Its own give `-y` to `--yaml` as well as to `--yes`, and some that do nothing."""


def silence_nemo_run() -> None:
    """Drop errors that NeMo-Run's parser logs before it raises them."""
    logging.getLogger("nemo_run.cli.cli_parser").disabled = True


class _WithoutBanner:
    """Standard output without the line that NeMo-Run prints first; everything else restores the original."""

    BANNER = "Configuring global options"

    def __init__(self, output: Any) -> None:
        self.output = output

    def write(self, text: str) -> int:
        if text == self.BANNER:
            return len(text)
        sys.stdout = self.output
        return len(text) if text == "\n" else self.output.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.output, name)


class CommandContext(RunContext):
    """NeMo-Run's context of one command, with errors on one line."""

    @classmethod
    def cli_command(cls, parent: Any, *args: Any, **options: Any) -> Callable[..., Any]:
        app: Any = _WithOptions(parent)
        return super().cli_command(app, *args, **options)

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        with refusals.on_one_line():
            super().cli_execute(fn, args, entrypoint_type)


class _WithOptions:
    """A Typer application that replaces the options of the commands that are added to it."""

    def __init__(self, app: typer.Typer) -> None:
        self.app = app

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        def add(function: Any) -> Any:
            @functools.wraps(function)
            def command(*args: Any, **kwargs: Any) -> Any:
                sys.stdout = _WithoutBanner(sys.stdout)  # type: ignore[assignment]
                return function(*args, **kwargs)

            signature = inspect.signature(function)
            parameters = [p.replace(default=OPTIONS.get(p.name, p.default)) for p in signature.parameters.values()]
            vars(command)["__signature__"] = signature.replace(parameters=parameters)
            return self.app.command(*args, **options)(command)

        return add


class CommandEntrypoint(Entrypoint):
    """A command that runs in this process and takes `name=value` words alone; `-y` is accepted and says nothing."""

    def _execute_simple(self, args: list[str], console: Any) -> None:
        with refusals.on_one_line():
            words = [word for word in args if word not in ("-y", "--yes")]
            for word in words:
                if word.startswith("-"):
                    raise ConfigError(f"{word}: there is no such option; see nemo llm {self.name} --help")
                if "=" not in word:
                    there_are = ", ".join(arguments_of(self.fn))
                    raise ConfigError(f"{word}: expected name=value (there are: {there_are})")
            call = override(run.Partial(self.fn), words)
            check_required(call, self.name)
            self.fn(**{str(name): _built(value) for name, value in call.__arguments__.items()})


def _built(value: Any) -> Any:
    import fiddle as fdl

    return fdl.build(value) if isinstance(value, fdl.Buildable) else value
