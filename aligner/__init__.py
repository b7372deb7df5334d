"""Preference tuning of LLMs on Megatron-Core, as NeMo-Run recipes: DPO and related losses.

    from aligner import executors, losses, recipes

`recipes` combines models and methods, `executors` launches recipes, and every recipe calls `aligner.api.align`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner import executors, losses, recipes
    from aligner.api import align

__all__ = ["align", "executors", "losses", "recipes"]


def __getattr__(name: str) -> Any:
    # On first use: importing NeMo takes ten seconds, and `aligner.data.rows` or `aligner.losses` do not need it.
    if name == "align":
        return import_module("aligner.api").align
    if name in __all__:
        return import_module(f"aligner.{name}")
    raise AttributeError(f"module 'aligner' has no attribute {name!r}")
