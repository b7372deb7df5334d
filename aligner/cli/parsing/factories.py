"""Recipes of `--factory`, MODEL_METHOD, listed by model and method; NeMo-Run's own help has a line for each."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import catalogue
import nemo_run as run
from nemo_run.cli.cli_parser import CLIException
from nemo_run.config import get_type_namespace

from aligner.cli.parsing.entrypoint import CommandEntrypoint
from aligner.cli.parsing.overrides import arguments_of
from aligner.common.errors import ConfigError

METHODS = ("sft", "dpo", "ipo", "rpo", "kto", "self_rewarding", "meta_rewarding", "spin", "rejection_sampling")


def names(command: Callable[..., Any]) -> list[str]:
    """Return the names of all factories that are registered for a command or type."""
    space = get_type_namespace(command)
    return sorted(name for *spaces, name in catalogue.REGISTRY if tuple(spaces) == (space,))


def list_recipes(command: Callable[..., Any], asked: str = "") -> str:
    """Describe the recipes of a command in one line, after the closest match to `asked`."""
    known = names(command)
    near = difflib.get_close_matches(asked.partition("(")[0], known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    groups = "; ".join(f"{', '.join(models)} with {', '.join(methods)}" for methods, models in by_method(known).items())
    return f"{hint}MODEL_METHOD can be {groups}"


def make(command: Callable[..., Any], named: str, parse: Callable[..., Any]) -> run.Partial:
    """Return the recipe of a factory, `NAME`, `NAME(argument=value)` or `module.function`.

    Args:
        command: command of the recipe.
        named: the factory.
        parse: NeMo-Run's parser of a factory.

    Raises:
        ConfigError: there is no such factory or module, an argument is invalid, or the result is no recipe.
    """
    name = named.partition("(")[0].strip()
    function = _function(command, name, named)
    try:
        # NeMo-Run would look for the signature of whatever a user's own function returns.
        recipe = function() if named == name and "." in name else parse(command, [])
    except CLIException as error:
        unknown = re.search(r"No parameter named '(\w+)'", str(error))
        arguments = arguments_of(function)
        if unknown is None:
            raise ConfigError(f"--factory: {named!r} cannot be read ({str(error).splitlines()[0][:200]})") from None
        near = difflib.get_close_matches(unknown[1], arguments, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--factory: {name} has no argument {unknown[1]!r}{hint} (there are: {', '.join(arguments)})"
        ) from None
    if not isinstance(recipe, run.Partial) or recipe.__fn_or_cls__ is not command:
        given = type(recipe).__name__
        if isinstance(recipe, run.Config | run.Partial):
            given = f"a run.{given} of {getattr(recipe.__fn_or_cls__, '__name__', recipe.__fn_or_cls__)}"
        raise ConfigError(f"--factory: {name} gives {given}, and a run.Partial of {command.__name__} is expected")
    return recipe


def _function(command: Callable[..., Any], name: str, named: str) -> Callable[..., Any]:
    """Return the function of a factory; one of the user's own is imported from the working folder, too."""
    space = get_type_namespace(command)
    if catalogue.check_exists(space, name):
        return catalogue._get((space, name))
    module, dot, function = name.rpartition(".")
    if not dot:
        raise ConfigError(f"--factory: there is no {named!r}; {list_recipes(command, named)}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--factory: {named!r} cannot be imported ({error})") from None
    if not callable(found):
        raise ConfigError(f"--factory: {named!r} is no function, but {type(found).__name__}")
    return found


def by_method(known: list[str]) -> dict[tuple[str, ...], list[str]]:
    """Group models by their methods: methods -> models."""
    methods: dict[str, list[str]] = {}
    for method in METHODS:
        for name in known:
            if name.endswith(f"_{method}"):
                methods.setdefault(name.removesuffix(f"_{method}"), []).append(method)
    models: dict[tuple[str, ...], list[str]] = {}
    for model in sorted(methods):
        models.setdefault(tuple(methods[model]), []).append(model)
    return models


class RecipesEntrypoint(CommandEntrypoint):
    """Entrypoint of a command that needs a recipe."""

    def help(self, console: Any = None, with_docs: bool = True) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        console = console or Console()
        recipes = Table(show_header=True, box=None, padding=(0, 2, 0, 0))
        recipes.add_column("method")
        recipes.add_column("model")
        for methods, models in by_method(names(self.fn)).items():
            recipes.add_row(" ".join(methods), " ".join(models))
        console.print(Panel(recipes, title="Recipes: --factory MODEL_METHOD", title_align="left"))
        arguments = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, meaning in _arguments(self.fn).items():
            arguments.add_row(name, meaning)
        console.print(Panel(arguments, title="Parts of a recipe", title_align="left"))


def _arguments(command: Callable[..., Any]) -> dict[str, str]:
    import docstring_parser

    descriptions = {p.arg_name: p.description or "" for p in docstring_parser.parse(command.__doc__ or "").params}
    return {name: " ".join(descriptions.get(name, "").split()) for name in inspect.signature(command).parameters}
