"""Recipes: functions that return a whole run as a `run.Partial` of `aligner.align`; nothing runs here.

    recipe = recipes.tiny_llama.dpo_recipe(dir="runs", name="first")
    recipe.loss.beta = 0.05
    run.run(recipe)

One module a model, named as NeMo names it, with `NAME`, `model()` and a function a method (`dpo_recipe`, ...). On the
command line these are the factories `<model>_<method>`: `nemo llm align --factory tiny_dpo`. Read `tiny_llama` first;
`families` makes the functions of all other models, `methods` sets what each minimizes.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.common import console

if TYPE_CHECKING:  # for editors and type checkers, which do not see what `__getattr__` imports
    from aligner.recipes import (
        gemma2_2b as gemma2_2b,
    )
    from aligner.recipes import (
        gemma2_9b as gemma2_9b,
    )
    from aligner.recipes import (
        gpt_2b as gpt_2b,
    )
    from aligner.recipes import (
        llama2_7b as llama2_7b,
    )
    from aligner.recipes import (
        llama3_8b as llama3_8b,
    )
    from aligner.recipes import (
        llama3_70b as llama3_70b,
    )
    from aligner.recipes import (
        llama31_8b as llama31_8b,
    )
    from aligner.recipes import (
        llama31_70b as llama31_70b,
    )
    from aligner.recipes import (
        llama31_405b as llama31_405b,
    )
    from aligner.recipes import (
        llama32_1b as llama32_1b,
    )
    from aligner.recipes import (
        llama32_3b as llama32_3b,
    )
    from aligner.recipes import (
        mistral_7b as mistral_7b,
    )
    from aligner.recipes import (
        mixtral_8x7b as mixtral_8x7b,
    )
    from aligner.recipes import (
        nemotron4_15b as nemotron4_15b,
    )
    from aligner.recipes import (
        nemotron4_340b as nemotron4_340b,
    )
    from aligner.recipes import (
        qwen2_7b as qwen2_7b,
    )
    from aligner.recipes import (
        qwen2_72b as qwen2_72b,
    )
    from aligner.recipes import (
        qwen2_500m as qwen2_500m,
    )
    from aligner.recipes import (
        qwen3_1p7b as qwen3_1p7b,
    )
    from aligner.recipes import (
        qwen3_4b as qwen3_4b,
    )
    from aligner.recipes import (
        qwen3_8b as qwen3_8b,
    )
    from aligner.recipes import (
        qwen3_14b as qwen3_14b,
    )
    from aligner.recipes import (
        qwen3_30b_a3b as qwen3_30b_a3b,
    )
    from aligner.recipes import (
        qwen3_32b as qwen3_32b,
    )
    from aligner.recipes import (
        qwen3_235b_a22b as qwen3_235b_a22b,
    )
    from aligner.recipes import (
        qwen3_600m as qwen3_600m,
    )
    from aligner.recipes import (
        smollm2_135m as smollm2_135m,
    )
    from aligner.recipes import (
        tiny_llama as tiny_llama,
    )

SHARED = ("families", "methods", "pipelines", "signatures", "sums", "table", "variants")
"""Modules that hold no model."""
MODELS = tuple(
    sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", *SHARED))
)


def __getattr__(name: str) -> Any:
    if name in MODELS:
        console.silence_nemo()
        return import_module(f"aligner.recipes.{name}")
    raise AttributeError(f"there are no recipes for a model {name!r}; there are: {', '.join(MODELS)}")


def __dir__() -> list[str]:
    return [*MODELS, "MODELS"]
