"""Recipes from the YAML that `--to-yaml` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nemo_run as run
import yaml

from aligner.common import trust
from aligner.common.errors import ConfigError, UntrustedError


def load_yaml(path: Path) -> run.Partial:
    """Load a recipe from the file that `--to-yaml` wrote.

    The file may be someone else's: nothing is imported that recipes do not have, since even a dry run calls it.

    Raises:
        ConfigError: the file is missing, does not describe a call, or names what recipes do not have.
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
    partial, is_call = bool(value.get("_partial_")), value.get("_call_", True) is not False
    target = _import(value["_target_"], where, called=is_call and not partial)
    if not is_call:
        return target
    if value.get(trust.REMOTE_CODE) and not trust.is_trusted(trust.REMOTE_CODE):
        raise ConfigError(str(trust.refusal(f"{where}.{trust.REMOTE_CODE}", trust.REMOTE_CODE, "recipe of this kind")))
    arguments = {k: _build(v, f"{where}.{k}") for k, v in value.items() if k not in ("_target_", "_partial_")}
    kind = run.Partial if partial else run.Config
    try:
        return kind(target, **arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _import(name: str, where: str, *, called: bool) -> Any:
    module, _, last = str(name).rpartition(".")
    try:
        return trust.lookup(module, last, f"{where}._target_", "recipe", called=called)
    except UntrustedError as error:
        raise ConfigError(str(error)) from None
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}._target_: cannot import {name!r} ({error})") from None
