"""Names of `loss`, `reference` and `peft` on the command line: `nemo llm align ... loss=ipo peft=lora`.

In Python these are `recipe.loss = run.Partial(losses.ipo)` and the like; the loss can be any function.
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
    """Set a part of a recipe by its name, with default arguments.

    Raises:
        ConfigError: the part has no such name.
    """
    choices = PARTS[part]()
    if value not in choices:
        raise ConfigError(f"{part}: there is no {value!r}; there are: {', '.join(choices)}")
    setattr(recipe, part, choices[value])


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
