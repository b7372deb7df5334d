"""Aligning language models with NeMo-Run recipes on Megatron-Core: DPO and its relatives.

    from aligner import executors, losses, recipes

`recipes` names combinations, `executors` says where they run, and `aligner.api.align` is what every recipe runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner import executors, losses, recipes
    from aligner.api import align

__all__ = ["align", "executors", "losses", "recipes"]


def __getattr__(name: str) -> Any:
    # On first use: NeMo takes ten seconds to import, and `aligner.data.rows` or `aligner.losses` need none of it.
    if name == "align":
        return import_module("aligner.api").align
    if name in __all__:
        return import_module(f"aligner.{name}")
    raise AttributeError(f"module 'aligner' has no attribute {name!r}")
