"""How `nemo llm align` reads its command line: NeMo-Run's way, with its dead ends closed.

Upstream (0.11.1) writes YAML that it cannot read back, and exits with 0 when a job on an executor failed.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Any, ClassVar

import nemo_run as run
import yaml
from nemo_run.cli.api import RunContext
from nemo_run.cli.cli_parser import CLIException, parse_cli_args, parse_value

from aligner import factories
from aligner.choices import PARTS, choose
from aligner.errors import ConfigError


class AlignContext(RunContext):
    """NeMo-Run's context of one command."""

    own: ClassVar[tuple[str, ...]] = ()
    """Arguments that are the command's and no recipe's."""
    recipes_of: ClassVar[tuple[str, ...]] = ()
    """Commands whose recipes this one takes."""

    def split(self, args: list[str]) -> tuple[dict[str, str], list[str]]:
        """What of a command line is the command's own, the last of each, and what is its recipe's."""
        mine = [arg for arg in args if "=" in arg and arg.partition("=")[0] in self.own]
        return dict(arg.split("=", 1) for arg in mine), [arg for arg in args if arg not in mine]

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> run.Partial:
        """The recipe that the command line describes.

        Raises:
            ConfigError: neither factory nor YAML is named, or an argument is not one.
        """
        if self.yaml:
            return override(load_yaml(Path(self.yaml)), args)
        if not self.factory:
            raise ConfigError(
                f"--factory: missing; name a recipe, for example --factory tiny_dpo, or --yaml FILE; "
                f"{factories.told(fn)}"
            )
        try:
            recipe = super().parse_fn(fn, [], **default_kwargs)
        except ValueError as error:
            if "No matching factory found" not in str(error):
                raise
            raise ConfigError(f"--factory: there is no {self.factory!r}; {factories.told(fn, self.factory)}") from None
        return override(recipe, args)

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        exports = any((self.to_yaml, self.to_toml, self.to_json))
        if self.executor is None or self.direct or self.repl or exports:
            super()._execute_task(fn, task_args)
            if self.dryrun and not exports:
                _rehearse(self.parse_fn(fn, task_args), None)
            return
        from aligner import executors

        task = self.parse_fn(fn, task_args)
        run.dryrun_fn(task, executor=self.executor)
        stages: dict[str, run.Partial] = {self.name: task}
        name = str(task.log.name if hasattr(task, "log") else Path(task.output).name)
        if self.dryrun:
            executors.dryrun(stages, self.executor, name=name)
            _rehearse(task, self.executor)
        elif self._should_continue(self.skip_confirmation):
            identity = executors.launch(stages, self.executor, name=name, detach=self.detach)
            if self.detach:
                print(f"submitted: nemo experiment status {identity}; nemo experiment logs {identity} 0")


def _rehearse(recipe: run.Partial, executor: run.Executor | None) -> None:
    from aligner import size
    from aligner.api import align
    from aligner.pipeline import self_reward
    from aligner.rehearsal import rehearse, rehearse_rounds

    rehearsals = {align: rehearse, self_reward: rehearse_rounds}
    if recipe.__fn_or_cls__ not in rehearsals:
        return
    rehearsals[recipe.__fn_or_cls__](recipe, executor)
    here = executor is None or isinstance(executor, run.LocalExecutor)
    try:
        print(size.told(recipe, size.this_machine(size.ranks(recipe)) if here else "h100"))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        # What would run is not refused for an estimate's sake: devices="auto", models of other kinds.
        print(f"size not known: {error}")


def override(recipe: run.Partial, args: list[str]) -> run.Partial:
    """Apply `path=value` arguments one by one, so that an error names the one that is wrong.

    Raises:
        ConfigError: an argument names nothing, or its value does not fit.
    """
    # First what a part is, then what is set in it, whichever is written first.
    for arg in sorted(args, key=lambda arg: arg.partition("=")[0].count(".")):
        part, _, value = arg.partition("=")
        if part in PARTS:
            choose(recipe, part, value)
            continue
        try:
            if not _set_itself(recipe, part, value):
                recipe = parse_cli_args(recipe, [arg])  # type: ignore[arg-type]
        except CLIException as error:
            path = re.split(r"[-+*/|&]?=", arg)[0]
            raise ConfigError(f"{path}: {_explain(recipe, path, arg, error)}") from None
    return recipe


def _set_itself(recipe: run.Partial, path: str, value: str) -> bool:
    """Set an argument that upstream cannot read: an enumeration's, or one whose module postpones annotations (LoRA).

    Raises:
        ConfigError: the enumeration has no such member.
    """
    *parents, last = path.split(".")
    at: Any = recipe
    for name in parents:
        at = getattr(at, name, None)
    parameters = inspect.signature(at.__fn_or_cls__).parameters if isinstance(at, run.Config | run.Partial) else {}
    kind = parameters[last].annotation if last in parameters else None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in kind.__members__:
            raise ConfigError(f"{path}: {value!r} is not one of {', '.join(kind.__members__)}")
        # YAML has no enumerations.
        setattr(at, last, run.Config(member, kind=f"{kind.__module__}.{kind.__qualname__}", name=value))
        return True
    if not isinstance(kind, str):
        return False
    target = at.__fn_or_cls__
    try:
        hints = typing.get_type_hints(
            target if dataclasses.is_dataclass(target) else getattr(target, "__init__", target)
        )
    except NameError:
        return False
    setattr(at, last, parse_value(value, hints.get(last)))
    return True


def member(kind: str, name: str) -> enum.Enum:
    """The member of an enumeration, both by name."""
    module, _, last = kind.rpartition(".")
    return getattr(importlib.import_module(module), last)[name]


def _explain(recipe: run.Partial, path: str, arg: str, error: Exception) -> str:
    """What is wrong with an override; upstream's message prints the whole recipe."""
    at: Any = recipe
    *parents, last = path.split(".")
    for i, name in enumerate(parents):
        at = getattr(at, name, None)
        if not isinstance(at, run.Config | run.Partial):
            return f"there is nothing to set below {'.'.join(parents[: i + 1])!r} of this recipe, which is {at!r}"
    known = settable(at)
    if last not in known:
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"there is no such argument{hint} (there are: {', '.join(known)})"
    value, choices = arg.partition("=")[2], re.search(r"Expected one of \((.*?)\)", str(error))
    if choices:
        return f"{value!r} is not one of {choices[1]}"
    return f"{value!r} does not fit ({str(error).splitlines()[0][:200]})"


def settable(config: run.Config | run.Partial) -> list[str]:
    """Arguments of what a config calls, but for those that a run gives it itself."""
    parameters = inspect.signature(config.__fn_or_cls__).parameters.values()
    return [
        p.name
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "pairs", "responses")
    ]


def load_yaml(path: Path) -> run.Partial:
    """Read what `--to-yaml` wrote.

    Raises:
        ConfigError: the file is missing or does not describe a call.
    """
    if not path.is_file():
        raise ConfigError(f"--yaml: {path} does not exist")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--yaml: {path} is not YAML ({error})") from None
    if not isinstance(found, dict) or "_target_" not in found:
        raise ConfigError(f"--yaml: {path} has no _target_; expected what `nemo llm align --to-yaml` writes")
    built = _build(found, str(path))
    assert isinstance(built, run.Partial)
    return built


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
