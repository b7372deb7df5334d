"""Recipes from the YAML that `--to-yaml` writes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import nemo_run as run
import yaml

from aligner.common.errors import ConfigError


def load_yaml(path: Path) -> run.Partial:
    """Load a recipe from the file that `--to-yaml` wrote.

    Raises:
        ConfigError: the file is missing or does not describe a call.
    """
    if not path.is_file():
        raise ConfigError(f"--yaml: {path} does not exist")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--yaml: {path} is not YAML ({error})") from None
    if not isinstance(document, dict) or "_target_" not in document:
        raise ConfigError(f"--yaml: {path} has no _target_; expected what `nemo llm align --to-yaml` writes")
    recipe = _build(document, str(path))
    assert isinstance(recipe, run.Partial)
    return recipe


def _build(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_build(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _build(item, f"{where}.{key}") for key, item in value.items()}
    target = _import(value["_target_"], where)
    if value.get("_call_", True) is False:
        return target
    arguments = {k: _build(v, f"{where}.{k}") for k, v in value.items() if k not in ("_target_", "_partial_")}
    kind = run.Partial if value.get("_partial_") else run.Config
    try:
        return kind(target, **arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _import(name: str, where: str) -> Any:
    module, _, rest = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}._target_: cannot import {name!r} ({error})") from None
