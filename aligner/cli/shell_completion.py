"""`nemo llm completion`: Tab completion of `nemo llm`.

NeMo-Run's own completion starts `nemo` at every Tab and never loads NeMo, so it ends at `nemo llm`; loading NeMo would
take fifteen seconds per Tab. This command writes the words into a shell script once.
"""

import inspect
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import nemo_run as run

from aligner.cli.parsing.factories import names
from aligner.cli.parsing.named_parts import PARTS
from aligner.cli.parsing.overrides import settable
from aligner.cli.stage_contexts import STAGES
from aligner.common.console import log_rank0
from aligner.common.errors import ConfigError
from aligner.common.files import atomic_write

SCRIPT = Path(__file__).with_name("completion.bash")
EXAMPLE = "tiny_"
"""Prefix of the recipes whose fields are completed; every model has the same fields."""
PLACE = Path("bash-completion", "completions", "nemo")


def completion(output: Optional[str] = None) -> None:
    """Write a script for Tab completion of `nemo llm`: commands, recipes, fields of a recipe, values of a field.

    The script is for bash; zsh reads it after `autoload -U bashcompinit; bashcompinit`. It contains the words of this
    version; run the command again after an upgrade.

    Args:
        output: path of the script; default ~/.local/share/bash-completion/completions/nemo, where bash-completion looks

    Raises:
        ConfigError: the file cannot be written.
    """
    text = script()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    path = Path(output).expanduser() if output else Path(data) / PLACE
    try:
        with atomic_write(path) as partial:
            partial.write_text(text)
    except OSError as error:
        raise ConfigError(f"output: {path} cannot be written ({error.strerror}); name another file") from None
    log_rank0(f"wrote {path}; for this shell: source {path}")


def script() -> str:
    """Return the script with the words of all commands."""
    from nemo_run.cli.api import list_entrypoints

    entrypoints: Any = list_entrypoints()["llm"]
    commands = {entry.name: entry for entry in entrypoints.values() if not isinstance(entry, dict)}
    options = sorted({option for entry in commands.values() for option in _options(entry)})
    cases = [_case(name, commands) for name in sorted(commands)]
    source = SCRIPT.read_text()
    return (
        source.replace("@VERSION@", metadata.version("nemo-align"))
        .replace("@COMMANDS@", " ".join(sorted(commands)))
        .replace("@OPTIONS@", " ".join(options))
        .replace("@CASES@", "\n".join(cases))
    )


def _case(name: str, commands: dict[str, Any]) -> str:
    context = commands[name].run_ctx_cls
    functions = [commands[other].fn for other in (name, *getattr(context, "recipes_of", ()))]
    words = [f"{own}=" for own in getattr(context, "own", ())] or list(_arguments(commands[name]))
    for fn in functions:
        words += _recipe_words(fn)
    factories = " ".join(factory for fn in functions for factory in names(fn))
    return f"    {name}) factories='{factories}' words='{' '.join(sorted(set(words)))}' ;;"


def _options(entry: Any) -> list[str]:
    import typer

    app = typer.Typer()
    entry.cli(app)
    return [option for parameter in typer.main.get_command(app).params for option in parameter.opts if option[1] == "-"]


def _arguments(entry: Any) -> Iterator[str]:
    for name, parameter in inspect.signature(entry.fn).parameters.items():
        yield f"{name}="
        yield from _factories(name, parameter.annotation)
    if entry.enable_executor:
        yield from _factories("run.executor", run.Executor)


def _factories(path: str, kind: Any) -> Iterator[str]:
    """Yield the factories that are registered for a type, and their fields."""
    if not isinstance(kind, type):
        return
    for name in names(kind):
        yield f"{path}={name}"
        factory = run.cli.resolve_factory(kind, name)
        # Some of NeMo's own factories need arguments.
        if factory.__module__.startswith("aligner"):
            yield from _fields(factory(), f"{path}.")


def _recipe_words(fn: Any) -> Iterator[str]:
    """Yield the fields of a function's recipes, and the names of its parts."""
    recipes: list[Any] = [run.cli.resolve_factory(fn, name)() for name in names(fn) if name.startswith(EXAMPLE)]
    prefix = ""
    for recipe in recipes:
        yield from _fields(recipe, "")
        # A field of a stage is set in every iteration.
        for iteration in recipe.__arguments__.get("iterations", ())[:1]:
            prefix = "align."
            for stage in STAGES:
                part = getattr(iteration, stage, None)
                yield from _fields(part.judge if part and stage == "judge" else part, f"{stage}.")
    for part, kinds in PARTS.items() if recipes else ():
        for kind, config in kinds().items():
            yield f"{prefix}{part}={kind}"
            yield from _fields(config, f"{prefix}{part}.")


def _fields(config: Any, prefix: str) -> Iterator[str]:
    """Yield every argument below a config, set or not, as `path=`."""
    if not isinstance(config, run.Config | run.Partial):
        return
    for name in settable(config):
        yield f"{prefix}{name}="
        yield from _fields(config.__arguments__.get(name), f"{prefix}{name}.")
