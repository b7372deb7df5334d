"""`nemo llm completion`: what Tab offers after `nemo llm`.

NeMo-Run's own completion starts `nemo` at every Tab and never loads NeMo, so it ends at `nemo llm`; loading NeMo would
make each Tab wait for fifteen seconds. Here the words are written into a shell script once.
"""

import inspect
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import nemo_run as run

from aligner.cli.factories import names
from aligner.cli.named_parts import PARTS
from aligner.cli.overrides import settable
from aligner.cli.stage_contexts import STAGES
from aligner.common.console import log_rank0
from aligner.common.errors import ConfigError
from aligner.common.files import atomic_write

SCRIPT = Path(__file__).with_name("completion.bash")
EXAMPLE = "tiny_"
"""Of a command that takes recipes: those whose fields are offered; every model has the same."""
PLACE = Path("bash-completion", "completions", "nemo")


def completion(output: Optional[str] = None) -> None:
    """Have Tab complete `nemo llm`: commands, recipes, the fields of a recipe, what a field may be called.

    Writes a script for bash, which zsh reads too (`autoload -U bashcompinit; bashcompinit` before it). It holds the
    words of the version that wrote it; write it again after an upgrade.

    Args:
        output: the script; ~/.local/share/bash-completion/completions/nemo, where bash-completion looks, if not given

    Raises:
        ConfigError: it cannot be written there.
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
    """The script with the words of all commands in it."""
    from nemo_run.cli.api import list_entrypoints

    found: Any = list_entrypoints()["llm"]
    commands = {entry.name: entry for entry in found.values() if not isinstance(entry, dict)}
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
    takes = [commands[other].fn for other in (name, *getattr(context, "recipes_of", ()))]
    words = [f"{own}=" for own in getattr(context, "own", ())] or list(_arguments(commands[name]))
    for fn in takes:
        words += _parts(fn)
    factories = " ".join(known for fn in takes for known in names(fn))
    return f"    {name}) factories='{factories}' words='{' '.join(sorted(set(words)))}' ;;"


def _options(entry: Any) -> list[str]:
    import typer

    app = typer.Typer()
    entry.cli(app)
    return [option for parameter in typer.main.get_command(app).params for option in parameter.opts if option[1] == "-"]


def _arguments(entry: Any) -> Iterator[str]:
    for name, parameter in inspect.signature(entry.fn).parameters.items():
        yield f"{name}="
        yield from _named(name, parameter.annotation)
    if entry.enable_executor:
        yield from _named("run.executor", run.Executor)


def _named(path: str, kind: Any) -> Iterator[str]:
    """What of a type is registered by name, and the fields of these."""
    if not isinstance(kind, type):
        return
    for name in names(kind):
        yield f"{path}={name}"
        factory = run.cli.resolve_factory(kind, name)
        # Some of NeMo's own need arguments.
        if factory.__module__.startswith("aligner"):
            yield from _fields(factory(), f"{path}.")


def _parts(fn: Any) -> Iterator[str]:
    """What a recipe of this function is made of, and what its parts may be called."""
    recipes: list[Any] = [run.cli.resolve_factory(fn, name)() for name in names(fn) if name.startswith(EXAMPLE)]
    before = ""
    for recipe in recipes:
        yield from _fields(recipe, "")
        # What is set of a stage is set in every round.
        for first in recipe.__arguments__.get("iterations", ())[:1]:
            before = "align."
            for stage in STAGES:
                part = getattr(first, stage, None)
                yield from _fields(part.judge if part and stage == "judge" else part, f"{stage}.")
    for part, kinds in PARTS.items() if recipes else ():
        for kind, made in kinds().items():
            yield f"{before}{part}={kind}"
            yield from _fields(made, f"{before}{part}.")


def _fields(config: Any, before: str) -> Iterator[str]:
    """Every argument below a config, set or not, as `path=`."""
    if not isinstance(config, run.Config | run.Partial):
        return
    for name in settable(config):
        yield f"{before}{name}="
        yield from _fields(config.__arguments__.get(name), f"{before}{name}.")
