"""Recipes of `--factory`, MODEL_METHOD, listed by model and method; NeMo-Run's own help has a line for each."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from nemo_run.cli.api import Entrypoint

METHODS = ("sft", "dpo", "ipo", "rpo", "kto", "self_rewarding", "meta_rewarding", "spin", "rejection_sampling")


def names(command: Callable[..., Any]) -> list[str]:
    """Return the names of all factories that are registered for a command or type."""
    import catalogue
    from nemo_run.config import get_type_namespace

    space = get_type_namespace(command)
    return sorted(name for *spaces, name in catalogue.REGISTRY if tuple(spaces) == (space,))


def list_recipes(command: Callable[..., Any], asked: str = "") -> str:
    """Describe the recipes of a command in one line, after the closest match to `asked`."""
    known = names(command)
    near = difflib.get_close_matches(asked.partition("(")[0], known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    groups = "; ".join(f"{', '.join(models)} with {', '.join(methods)}" for methods, models in by_method(known).items())
    return f"{hint}MODEL_METHOD can be {groups}"


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


class RecipesEntrypoint(Entrypoint):
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
