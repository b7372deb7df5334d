"""`path=value` arguments applied to a recipe; an error names the invalid argument."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import inspect
import re
import typing
from typing import Any

import nemo_run as run
from nemo_run.cli.cli_parser import CLIException, parse_cli_args, parse_value

from aligner.cli.named_parts import PARTS, set_by_name
from aligner.common.errors import ConfigError


def override(recipe: run.Partial, args: list[str]) -> run.Partial:
    """Apply `path=value` arguments one by one; an error names the invalid one.

    Raises:
        ConfigError: a path does not exist, or its value does not fit.
    """
    # Parts are set before their fields, in whatever order the user typed them.
    for arg in sorted(args, key=lambda arg: arg.partition("=")[0].count(".")):
        part, _, value = arg.partition("=")
        if part in PARTS:
            set_by_name(recipe, part, value)
            continue
        try:
            if not _set_directly(recipe, part, value):
                recipe = parse_cli_args(recipe, [arg])  # type: ignore[arg-type]
        except CLIException as error:
            path = re.split(r"[-+*/|&]?=", arg)[0]
            raise ConfigError(f"{path}: {_explain(recipe, path, arg, error)}") from None
    return recipe


def _set_directly(recipe: run.Partial, path: str, value: str) -> bool:
    """Set an argument that NeMo-Run cannot parse: an enumeration, or one with a postponed annotation (LoRA).

    Returns False for other arguments.

    Raises:
        ConfigError: the enumeration has no such member.
    """
    *parents, last = path.split(".")
    config: Any = recipe
    for name in parents:
        config = getattr(config, name, None)
    is_config = isinstance(config, run.Config | run.Partial)
    parameters = inspect.signature(config.__fn_or_cls__).parameters if is_config else {}
    kind = parameters[last].annotation if last in parameters else None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in kind.__members__:
            raise ConfigError(f"{path}: {value!r} is not one of {', '.join(kind.__members__)}")
        # YAML has no enumerations.
        setattr(config, last, run.Config(member, kind=f"{kind.__module__}.{kind.__qualname__}", name=value))
        return True
    if not isinstance(kind, str):
        return False
    target = config.__fn_or_cls__
    try:
        hints = typing.get_type_hints(
            target if dataclasses.is_dataclass(target) else getattr(target, "__init__", target)
        )
    except NameError:
        return False
    setattr(config, last, parse_value(value, hints.get(last)))
    return True


def member(kind: str, name: str) -> enum.Enum:
    """Return the member of an enumeration, both by name."""
    module, _, last = kind.rpartition(".")
    return getattr(importlib.import_module(module), last)[name]


def _explain(recipe: run.Partial, path: str, arg: str, error: Exception) -> str:
    """Explain the error of an override; NeMo-Run's message prints the whole recipe."""
    config: Any = recipe
    *parents, last = path.split(".")
    for i, name in enumerate(parents):
        config = getattr(config, name, None)
        if not isinstance(config, run.Config | run.Partial):
            return f"there is nothing to set below {'.'.join(parents[: i + 1])!r} of this recipe, which is {config!r}"
    arguments = settable(config)
    if last not in arguments:
        near = difflib.get_close_matches(last, arguments, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"there is no such argument{hint} (there are: {', '.join(arguments)})"
    value, choices = arg.partition("=")[2], re.search(r"Expected one of \((.*?)\)", str(error))
    if choices:
        return f"{value!r} is not one of {choices[1]}"
    return f"{value!r} does not fit ({str(error).splitlines()[0][:200]})"


def settable(config: run.Config | run.Partial) -> list[str]:
    """Return the arguments that a config can set; a run passes the other ones itself."""
    parameters = inspect.signature(config.__fn_or_cls__).parameters.values()
    return [
        p.name
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "pairs", "responses")
    ]
