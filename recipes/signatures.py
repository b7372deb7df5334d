"""Signatures that the recipes of all models share.

NeMo-Run's command line and editors read a recipe's arguments from its signature, so each signature is written out once
here as a function, and once as a protocol for type checkers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Protocol, Union

import nemo_run as run


@dataclass(frozen=True, kw_only=True)
class AlignArguments:
    """Arguments of a recipe of `align`."""

    dir: str
    name: str
    num_nodes: Optional[int]
    num_gpus_per_node: int
    peft_scheme: Optional[str]
    packed_sequence: bool
    seq_length: int
    train: str | run.Partial | None
    """A function makes the file when the run asks for it."""
    validation: str | run.Partial | None
    init_from: str | run.Partial | None
    """A recipe is run first."""


class AlignRecipe(Protocol):
    """A recipe of `align`.

    `init_from` is a checkpoint, a run, a Hugging Face folder or `hf://name`; `peft_scheme` is "lora", "dora" or None.
    """

    def __call__(
        self,
        dir: str = "runs",
        name: str = ...,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = ...,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        seq_length: int = ...,
        train: Optional[str] = ...,
        validation: Optional[str] = None,
        init_from: Optional[str] = ...,
    ) -> run.Partial: ...


class PipelineRecipe(Protocol):
    """A recipe of `self_reward`.

    `variant` is `paper` or `nemo_aligner` (`aligner.recipes.variants`); what is None is the variant's own.
    `held_out` are prompts for scores of all policies by the judge of the first iteration.
    """

    def __call__(
        self,
        dir: str = "runs",
        name: str = ...,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = ...,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        seq_length: int = ...,
        prompts: Union[str, list[str]] = "prompts.jsonl",
        init_from: str = ...,
        variant: str = "paper",
        iterations: Optional[int] = None,
        num_generations: Optional[int] = None,
        num_judgments: Optional[int] = None,
        beta: Union[float, list[float]] = 0.1,
        length_control: Optional[Union[float, list[float]]] = None,
        held_out: Optional[str] = None,
    ) -> run.Partial: ...


def align_recipe(
    build: Callable[[AlignArguments], run.Partial],
    *,
    default_name: str,
    default_gpus: int = 1,
    default_seq_length: int,
    default_train: Optional[str] = None,
    default_init_from: Optional[str] = None,
) -> AlignRecipe:
    """A function with the signature of `AlignRecipe` and these defaults, which builds its recipe by `build`."""

    def recipe(
        dir: str = "runs",
        name: str = default_name,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = default_gpus,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        seq_length: int = default_seq_length,
        train: Optional[str] = default_train,
        validation: Optional[str] = None,
        init_from: Optional[str] = default_init_from,
    ) -> run.Partial:
        arguments = AlignArguments(
            dir=dir, name=name, num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, peft_scheme=peft_scheme,
            packed_sequence=packed_sequence, seq_length=seq_length, train=train, validation=validation,
            init_from=init_from,
        )  # fmt: skip
        return build(arguments)

    return recipe


def register(recipe: Any, *, target: Callable[..., Any], module: str, method: str, model: str, doc: str) -> None:
    """Give a recipe the name and docstring that help and completion show, and a factory for the command line.

    Args:
        recipe: the function.
        target: `align` or `self_reward`.
        module: full name of the model's module.
        method: as in `<method>_recipe`.
        model: as in the factory `<model>_<method>`.
        doc: the docstring.
    """
    recipe.__name__ = recipe.__qualname__ = f"{method}_recipe"
    recipe.__module__, recipe.__doc__ = module, doc
    run.cli.factory(recipe, target=target, name=f"{model}_{method}")
