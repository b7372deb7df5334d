"""Recipes as YAML that reads back: what YAML has no word for becomes a call of a function of this module.

A number of NumPy becomes a number, a NeMo object the config that it was built from. What has no such form becomes its
text, and the recipe then cannot be run again.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import torch

from aligner.common import secrets_filter, trust


def member(kind: str, name: str) -> enum.Enum:
    """Return the member of an enumeration, both by name.

    Raises:
        UntrustedError: `kind` is no enumeration, or in a module that neither a file may import nor the process has.
    """
    module, _, last = kind.rpartition(".")
    if module in sys.modules:  # as that of an override, whose configuration is there
        found = getattr(sys.modules[module], last)
    else:
        found = trust.lookup(module, last, "yaml_values.member", "recipe")
    if not isinstance(found, type) or not issubclass(found, enum.Enum):
        raise trust.refusal("yaml_values.member", kind, "recipe")
    return found[name]


def path(text: str) -> Path:
    """Return a path."""
    return Path(text)


def seconds(number: float) -> datetime.timedelta:
    """Return a duration."""
    return datetime.timedelta(seconds=number)


def dtype(name: str) -> torch.dtype:
    """Return a data type of torch, as `bfloat16`."""
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise trust.refusal("yaml_values.dtype", f"torch.{name}", "recipe")
    return found


def representable(recipe: run.Partial, keep: Callable[[Any], bool] = lambda _: False) -> tuple[run.Partial, list[str]]:
    """Return a copy of a recipe that YAML can hold, and the paths of what is text in it and cannot be read back.

    Args:
        recipe: the recipe.
        keep: whether an object that has no such form stays as it is, since its reader knows one.
    """
    as_text: list[str] = []
    return _converted(recipe, "", as_text, keep), as_text


def without_secrets(recipe: run.Partial) -> tuple[run.Partial, list[str]]:
    """Return a copy of a representable recipe with its secrets hidden, and their paths."""
    paths: list[str] = []
    return _without_secrets(recipe, "", paths), paths


def _without_secrets(value: Any, where: str, paths: list[str]) -> Any:
    """Hide the secrets of a value; `where` is its path."""
    inner = functools.partial(_without_secrets, paths=paths)
    if isinstance(value, fdl.Buildable):
        return _with_arguments(value, where, inner)
    if isinstance(value, dict):
        return {key: inner(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [inner(item, f"{where}[{i}]") for i, item in enumerate(value)]
    shown = secrets_filter.hidden_in(value, name=where.rpartition(".")[2]) if isinstance(value, str) else value
    if shown is not value and shown != value:
        paths.append(where)
    return shown


def _with_arguments(config: Any, where: str, convert: Callable[[Any, str], Any]) -> Any:
    """Return a copy of a config whose named arguments are converted, each with its path."""
    copied = config.__copy__()
    for name, argument in config.__arguments__.items():
        if isinstance(name, str):
            setattr(copied, name, convert(argument, f"{where}.{name}".lstrip(".")))
    return copied


def _converted(value: Any, where: str, as_text: list[str], keep: Callable[[Any], bool]) -> Any:
    """Convert a value; `where` is its path."""
    inner = functools.partial(_converted, as_text=as_text, keep=keep)
    if value is None or type(value) in (bool, int, float, str) or _is_importable(value):
        return value
    if isinstance(value, fdl.Buildable):
        return _with_arguments(value, where, inner)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            as_text.append(where)
        return {str(key): inner(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [inner(item, f"{where}[{i}]") for i, item in enumerate(value)]
    found = _as_config(value)
    if found is not _NONE:
        return inner(found, where) if isinstance(found, fdl.Buildable) else found
    if keep(value):
        return value
    as_text.append(where)
    return str(value)


def _is_importable(value: Any) -> bool:
    """Return whether a function or class is found again by its module and name."""
    return (isinstance(value, type) or inspect.isfunction(value) or inspect.isbuiltin(value)) and (
        "<" not in value.__qualname__
    )


_NONE = object()


def _as_config(value: Any) -> Any:
    """Return what an object can be read back from; `_NONE` if there is nothing."""
    if isinstance(value, enum.Enum):
        kind = type(value)
        return run.Config(member, kind=f"{kind.__module__}.{kind.__qualname__}", name=value.name)
    if isinstance(value, Path):
        return run.Config(path, text=str(value))
    if isinstance(value, datetime.timedelta):
        return run.Config(seconds, number=value.total_seconds())
    if isinstance(value, torch.dtype):
        return run.Config(dtype, name=str(value).removeprefix("torch."))
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():  # a number of NumPy or torch
        return value.item()
    if isinstance(value, bool | int | float | str):  # of a class of its own
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if isinstance(getattr(value, "__io__", None), fdl.Buildable):
        return value.__io__
    if isinstance(value, functools.partial) and not value.args and _is_importable(value.func):
        return run.Partial(value.func, **value.keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return run.Config(type(value), **{f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init})
    return _NONE
