"""Trained adapters (LoRA, DoRA): their base checkpoint, compatibility checks, and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo.collections.llm.peft import DoRA, LoRA
from nemo.lightning.ckpt_utils import ADAPTER_META_FILENAME, CONTEXT_PATH, WEIGHTS_PATH
from nemo.lightning.pytorch.callbacks import PEFT

from aligner.backend import safe_reading
from aligner.common import trust
from aligner.common.errors import CheckpointError, ConfigError

COMPARED = ("dim", "alpha", "target_modules", "dropout_position")
"""Fields that must match the checkpoint; a new run may change dropout and initialization."""


def base_of(checkpoint: Path) -> Path | None:
    """Return the base of an adapter checkpoint; None for a checkpoint of a full model.

    Raises:
        CheckpointError: the base checkpoint is missing at its recorded path.
    """
    meta = checkpoint / WEIGHTS_PATH / ADAPTER_META_FILENAME
    if not meta.is_file():
        return None
    base = Path(json.loads(meta.read_text())["model_ckpt_path"])
    base = base.parent if base.name == WEIGHTS_PATH else base
    if not (base / WEIGHTS_PATH).is_dir():
        raise CheckpointError(
            f"{checkpoint}: holds adapters of {base}, which is not there; put it back, or, if it was moved, correct "
            f"{meta} (a run keeps its newest checkpoint only: training a base further takes it from its adapters)"
        )
    return base


def check(peft: PEFT | None, checkpoint: Path | None, *, continued: bool) -> None:
    """Compare the configured adapters with the checkpoint that a run resumes (`continued`) or starts from.

    Raises:
        ConfigError: `peft` does not match the checkpoint's adapters, is set on a resumed run of all weights, or has
            no base checkpoint.
    """
    if checkpoint is None:
        if peft is not None:
            raise ConfigError(
                "peft: adapters are saved without their base, which would be random here and lost; set "
                "resume.restore_config.path or resume.init_stage"
            )
        return
    if base_of(checkpoint) is None:
        if continued and peft is not None:
            raise ConfigError(
                f"peft: is {type(peft).__name__}, but the run has trained all weights so far ({checkpoint}), and would "
                "lose them; start adapters under another log.name, with resume.restore_config.path set to that"
            )
        return
    if peft is None and continued:
        raise ConfigError(f"peft: is None, but the run has trained adapters so far ({checkpoint}); set it as it was")
    if peft is None:
        raise ConfigError(
            f"peft: is None, but {checkpoint} holds adapters alone; set peft as it was to go on training them, or "
            f"merge them first (nemo llm merge-lora checkpoint={checkpoint} output=merged) and start from that"
        )
    _check_same_adapters(peft, checkpoint)


def _check_same_adapters(peft: PEFT, checkpoint: Path) -> None:
    trust.know([peft])
    saved: Any = safe_reading.load_context(checkpoint / CONTEXT_PATH, "model.model_transform")
    if type(saved) is not type(peft):
        raise ConfigError(f"peft: is {type(peft).__name__}, but {checkpoint} holds {type(saved).__name__} adapters")
    for name in COMPARED:
        ours, theirs = getattr(peft, name, None), getattr(saved, name, None)
        if isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs:
            raise ConfigError(f"peft.{name}: is {ours!r}, but the adapters of {checkpoint} were made with {theirs!r}")


def peft_config_of(checkpoint: Path) -> PEFT:
    """Load the LoRA or DoRA config of a checkpoint's adapters.

    Raises:
        CheckpointError: the adapters are neither LoRA nor DoRA.
    """
    peft: Any = safe_reading.load_context(checkpoint / CONTEXT_PATH, "model.model_transform")
    if type(peft) not in (LoRA, DoRA):
        raise CheckpointError(f"checkpoint: {checkpoint} holds {type(peft).__name__} adapters; LoRA and DoRA are known")
    return peft


def load(trainer: Any, checkpoint: Path) -> None:
    """Load a checkpoint's adapters into a model with new adapters; optimizer and schedule are not loaded."""
    strategy, weights = trainer.strategy, checkpoint / WEIGHTS_PATH
    metadata = strategy.unwrapped_checkpoint_io.load_content_metadata(weights)
    pieces = {
        name: piece
        for name, piece in strategy.megatron_parallel.sharded_state_dict(metadata=metadata).items()
        if ".adapter." in name
    }
    loaded = strategy.unwrapped_checkpoint_io.load_checkpoint(weights, sharded_state_dict={"state_dict": pieces})
    strategy.load_model_state_dict({"state_dict": loaded["state_dict"]}, strict=False)
    for optimizer in trainer.optimizers:
        # The optimizer's float32 copy of half-precision weights would overwrite the loaded weights.
        getattr(optimizer, "mcore_optimizer", optimizer).reload_model_params()
