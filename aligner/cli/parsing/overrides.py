"""`path=value` arguments applied to a recipe; an error names the invalid argument."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import nemo_run as run
from nemo_run.cli.cli_parser import CLIException, parse_cli_args, parse_value

from aligner.api import align
from aligner.cli.parsing.named_parts import PARTS, set_by_name
from aligner.common import yaml_values
from aligner.common.errors import ConfigError

TYPES = {
    int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None",
    list: "a list, as [a,b]", dict: "a dictionary, as {'a': 1}",
}  # fmt: skip


def override(recipe: run.Partial, args: list[str], *, within: str = "") -> run.Partial:
    """Apply `path=value` arguments one by one; an error names the invalid one.

    Args:
        recipe: recipe, or a config in it.
        args: arguments.
        within: path of the config for messages, as `run.executor.`.

    Raises:
        ConfigError: a path does not exist, or its value does not fit.
    """
    # Parts are set before their fields, in whatever order the user typed them.
    for arg in sorted(args, key=lambda arg: arg.partition("=")[0].count(".")):
        part, equals, value = arg.partition("=")
        if not equals:
            raise ConfigError(f"{within}{arg}: expected name=value")
        if part in PARTS and recipe.__fn_or_cls__ is align:
            set_by_name(recipe, part, value)
            continue
        try:
            if not _set_directly(recipe, part, value):
                recipe = parse_cli_args(recipe, [arg])  # type: ignore[arg-type]
        except CLIException as error:
            path = re.split(r"[-+*/|&]?=", arg)[0]
            raise ConfigError(f"{within}{path}: {_explain(recipe, path, arg, error)}") from None
    return recipe


def check_required(config: run.Config | run.Partial, command: str, *, within: str = "") -> None:
    """Check that every argument without a default is given.

    Raises:
        ConfigError: one is missing.
    """
    parameters = inspect.signature(config.__fn_or_cls__).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]
    missing = [f"{within}{name}" for name in required if name not in config.__arguments__]
    if missing:
        wanted = " ".join(f"{name}=..." for name in missing)
        raise ConfigError(f"{', '.join(missing)}: missing; add {wanted} (nemo llm {command} --help says what it is)")


def arguments_of(function: Any) -> list[str]:
    """Return the names of a function's arguments."""
    return list(inspect.signature(function).parameters)


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
        setattr(config, last, run.Config(yaml_values.member, kind=f"{kind.__module__}.{kind.__qualname__}", name=value))
        return True
    postponed = isinstance(kind, str)
    if postponed:
        target = config.__fn_or_cls__
        try:
            hints = typing.get_type_hints(
                target if dataclasses.is_dataclass(target) else getattr(target, "__init__", target)
            )
        except NameError:
            return False
        kind = hints.get(last)
    found = None if kind is None else _literal(kind, value)
    if found is None and not postponed:
        return False
    setattr(config, last, parse_value(value, kind) if found is None else found)
    return True


def _literal(kind: Any, value: str) -> list[Any] | dict[Any, Any] | None:
    """Return a dictionary, or a list of strings, that NeMo-Run would misread.

    It takes a dictionary for text where text is allowed, too, and needs the quotes of a list of strings, which a shell
    removes: `[loss.beta]`. None: the value is neither.
    """
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if any(typing.get_origin(option) in (dict, Mapping) for option in options) and value.lstrip().startswith("{"):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return None
        return found if isinstance(found, dict) else None
    kinds = [typing.get_args(option) for option in options if typing.get_origin(option) in (list, Sequence)]
    if (str,) not in kinds and (Any,) not in kinds:
        return None
    listed = re.fullmatch(r"\[([^\[\]'\"]*)\]", value.strip())
    if listed is None and (str in options or (str,) not in kinds):
        return None
    inner = listed[1] if listed else value
    if any(mark in inner for mark in "[]'\"()") or inner.strip() == "None":
        return None
    words = [word.strip() for word in inner.split(",") if word.strip()]
    return words if (str,) in kinds else [_number_or_word(word) for word in words]


def _number_or_word(word: str) -> Any:
    try:
        return float(word)
    except ValueError:
        return word


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
        return "there is no such argument; " + (
            f"did you mean {'.'.join([*parents, near[0]])!r}?" if near else f"there are: {', '.join(arguments)}"
        )
    value, choices = arg.partition("=")[2], re.search(r"Expected one of \((.*?)\)", str(error))
    if choices:
        return f"{value!r} is not one of {choices[1]}"
    expected = _described(inspect.signature(config.__fn_or_cls__).parameters[last].annotation)
    return f"expected {expected}, found {value!r}"


def _described(kind: Any) -> str:
    """Describe the type of an argument as one would say it."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_described(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple, Sequence):
        return "a list, as [a,b]"
    if typing.get_origin(kind) in (dict, Mapping):
        return "a dictionary, as {'a': 1}"
    return TYPES.get(kind, getattr(kind, "__name__", str(kind)))


def settable(config: run.Config | run.Partial) -> list[str]:
    """Return the arguments that a config can set; a run passes the other ones itself."""
    parameters = inspect.signature(config.__fn_or_cls__).parameters.values()
    return [
        p.name
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "pairs", "responses")
    ]
