"""What `loss`, `reference` and `peft` may be called on the command line: `nemo llm align ... loss=ipo peft=lora`.

In Python these are `recipe.loss = run.Partial(losses.ipo)` and the like, and any function will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nemo_run as run

from aligner import losses
from aligner.common.errors import ConfigError
from aligner.losses import unpaired

LOSSES = (
    losses.dpo, losses.robust_dpo, losses.ipo, losses.hinge, losses.exo_pair, losses.rpo_sq, losses.rpo_bwd_kl,
    losses.rpo_fwd_kl, losses.apo_zero, losses.apo_down, losses.nca_pair, losses.sppo_hard, losses.simpo, losses.orpo,
    unpaired.kto,
)  # fmt: skip


def set_by_name(recipe: run.Partial, part: str, value: str) -> None:
    """Set a part of a recipe to what `value` names, with its default arguments.

    Raises:
        ConfigError: there is nothing of that name.
    """
    there_are = PARTS[part]()
    if value not in there_are:
        raise ConfigError(f"{part}: there is no {value!r}; there are: {', '.join(there_are)}")
    setattr(recipe, part, there_are[value])


def _losses() -> dict[str, Any]:
    return {loss.__name__: run.Partial(loss) for loss in LOSSES}


def _references() -> dict[str, Any]:
    from aligner.model.reference import BaseModelReference, CachedReference, FrozenReference, SyncedReference

    kinds = {
        "cached": CachedReference,
        "frozen": FrozenReference,
        "base_model": BaseModelReference,
        "synced": SyncedReference,
    }
    return {name: run.Config(kind) for name, kind in kinds.items()} | {"none": None}


def _adapters() -> dict[str, Any]:
    from aligner.recipes import methods

    return {"lora": methods.adapters("lora"), "dora": methods.adapters("dora"), "none": None}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"loss": _losses, "reference": _references, "peft": _adapters}
