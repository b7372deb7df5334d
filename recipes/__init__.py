"""Recipes: functions that return a whole run as a `run.Partial` of `aligner.align`; nothing runs here.

    recipe = recipes.tiny_llama.dpo_recipe(dir="runs", name="first")
    recipe.loss.beta = 0.05
    run.run(recipe)

`families` makes the functions of a model, `methods` says what each minimizes. One module a model, named as NeMo names it, with `NAME`, `model()` and a function a method (`dpo_recipe`, ...).
On the command line they are the factories `<model>_<method>`: `nemo llm align --factory tiny_dpo`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aligner.common import console

if TYPE_CHECKING:
    from aligner.recipes import (
        gemma2_2b,
        gemma2_9b,
        gpt_2b,
        llama2_7b,
        llama3_8b,
        llama3_70b,
        llama31_8b,
        llama31_70b,
        llama31_405b,
        llama32_1b,
        llama32_3b,
        mistral_7b,
        mixtral_8x7b,
        nemotron4_15b,
        nemotron4_340b,
        qwen2_7b,
        qwen2_72b,
        qwen2_500m,
        qwen3_1p7b,
        qwen3_4b,
        qwen3_8b,
        qwen3_14b,
        qwen3_30b_a3b,
        qwen3_32b,
        qwen3_235b_a22b,
        qwen3_600m,
        smollm2_135m,
        tiny_llama,
    )

__all__ = [
    "gemma2_2b",
    "gemma2_9b",
    "gpt_2b",
    "llama2_7b",
    "llama3_8b",
    "llama3_70b",
    "llama31_8b",
    "llama31_70b",
    "llama31_405b",
    "llama32_1b",
    "llama32_3b",
    "mistral_7b",
    "mixtral_8x7b",
    "nemotron4_15b",
    "nemotron4_340b",
    "qwen2_7b",
    "qwen2_72b",
    "qwen2_500m",
    "qwen3_1p7b",
    "qwen3_4b",
    "qwen3_8b",
    "qwen3_14b",
    "qwen3_30b_a3b",
    "qwen3_32b",
    "qwen3_235b_a22b",
    "qwen3_600m",
    "smollm2_135m",
    "tiny_llama",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        console.silence_nemo()
        return import_module(f"aligner.recipes.{name}")
    raise AttributeError(f"there are no recipes for a model {name!r}; there are: {', '.join(__all__)}")
