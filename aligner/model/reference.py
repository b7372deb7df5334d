"""Reference models: the initial policy, its base model, or a synchronized copy.

    CachedReference         initial policy, scored once before training; no memory and no time afterwards
    FrozenReference         initial policy as a copy of the trained weights
    BaseModelReference      base model below new adapters
    SyncedReference         copy that is updated from the policy during training

`reference=None` is for objectives that need no reference. All references score with `aligner.model.scoring`, without
dropout and in the precision of training.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from aligner.backend.hardware import compute_dtype
from aligner.common.console import log_rank0
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.files import atomic_write
from aligner.data.batch import Split
from aligner.data.module import AlignDataModule
from aligner.model import architecture, weight_copy
from aligner.model.scoring import score_split
from aligner.model.weights_hash import weights_hash

VERSION = 2
"""Cache version. Increase it when a change of scoring alters the numbers: older caches are then ignored."""


class Reference:
    """Base class of references."""

    scored_per_step = True
    """Whether each batch is scored at its step, by the model with the reference's weights."""
    scores_expire = False
    """Whether a row's score is outdated when the row recurs."""

    def prepare(self, trainer: Any, data: AlignDataModule, *, runs: Path, resumed: Path | None) -> dict[Split, Tensor]:
        """Prepare the reference before the first step of a job; every rank must call.

        The policy has its initial weights, or the weights of the checkpoint `resumed`.

        Returns:
            Log-probabilities of all rows of each split, `[rows, K]` nats; zeros if `scored_per_step`.
        """
        return {split: torch.zeros(len(rows), len(rows[0].responses)) for split, rows in data.datasets.items()}

    def use_reference_model(self) -> contextlib.AbstractContextManager[None]:
        """Run a block with the reference's weights in the model."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Update the reference after the policy's optimizer step `step`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints, equal on all ranks."""
        return {"kind": type(self).__name__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kind"] != type(self).__name__:
            raise ConfigError(
                f"reference: the run began with {state['kind']} and would go on with {type(self).__name__}; restore "
                "it, or start under another log.name"
            )

    def sharded_state(self) -> dict[str, Any]:
        """Return the state for checkpoints as Megatron's sharded tensors."""
        return {}


@dataclass(kw_only=True)
class CachedReference(Reference):
    """Log-probabilities of the initial policy, computed once before training and cached on disk.

    Args:
        dir: cache folder; None: `reference` in `log.log_dir`, shared by all its runs.
    """

    dir: Optional[str] = None

    weights: Optional[str] = field(default=None, init=False)
    """Hashes of the reference's weights and architecture; a resumed run loads the hashes from its checkpoint."""

    scored_per_step = False

    def prepare(self, trainer: Any, data: AlignDataModule, *, runs: Path, resumed: Path | None) -> dict[Split, Tensor]:
        """See `Reference.prepare`.

        Raises:
            CheckpointError: a resumed run's cache is missing; the initial weights are no longer in memory.
        """
        if resumed is None:
            function = architecture.architecture_hash(trainer.lightning_module.config)
            self.weights = f"{weights_hash(trainer.strategy.megatron_parallel)} {function}"
        folder = Path(self.dir).expanduser() if self.dir else runs / "reference"
        reference: dict[Split, Tensor] = {}
        for split in data.datasets:
            path = folder / f"{self.key(data, split, _dtype(trainer))}.safetensors"
            scores = _load(path, trainer)
            if scores is not None:
                log_rank0(f"reference of {split}: {len(scores)} rows from {path}")
            elif resumed is not None:
                raise CheckpointError(
                    f"reference.dir: {path} is gone or damaged, or data.{split} is not what it was, and the weights in "
                    "memory are already trained, so it cannot be computed again; put back what changed, or start the "
                    "run anew under another log.name"
                )
            else:
                scores = score_split(trainer, data, split)
                _save(scores, path, trainer)
                log_rank0(f"reference of {split}: {len(scores)} rows scored, kept in {path}")
            reference[split] = scores
        return reference

    def key(self, data: AlignDataModule, split: Split, dtype: torch.dtype) -> str:
        """Compute the cache name, a hash of weights, tokens, masks, precision and scoring version."""
        parts = {
            "weights": self.weights,
            "tokens": data.fingerprint(split),
            "dtype": str(dtype),
            "code": VERSION,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.weights = state["weights"]


@dataclass(kw_only=True)
class FrozenReference(Reference):
    """Copy of the initial policy's trainable weights; with LoRA, of the adapters.

    For data that changes between epochs, or is too large to score beforehand. Costs the memory of the copy and a
    forward pass per step.

    Args:
        cpu_offload: keep the copy in host memory and exchange it with the policy's weights for each scoring.
    """

    cpu_offload: bool = False

    def prepare(self, trainer: Any, data: AlignDataModule, *, runs: Path, resumed: Path | None) -> dict[Split, Tensor]:
        """See `Reference.prepare`."""
        model = trainer.strategy.megatron_parallel
        self._weight_copy = weight_copy.WeightCopy(model, cpu_offload=self.cpu_offload, dtype=self._dtype())
        if resumed is not None:
            self._weight_copy.load(resumed)
        return super().prepare(trainer, data, runs=runs, resumed=resumed)

    def _dtype(self) -> Optional[torch.dtype]:
        return None

    def use_reference_model(self) -> contextlib.AbstractContextManager[None]:
        return self._weight_copy.use_copy()

    def sharded_state(self) -> dict[str, Any]:
        return self._weight_copy.sharded()


@dataclass(kw_only=True)
class SyncedReference(FrozenReference):
    """Reference synchronized with the policy: every `sync_steps` steps π_ref ← α π + (1 - α) π_ref, on the weights.

    `mixup_alpha=1` copies the policy; `sync_steps=1` with a small α is an exponential moving average.

    Args:
        mixup_alpha: weight α of the policy (TRL: `ref_model_mixup_alpha`).
        sync_steps: optimizer steps between synchronizations (TRL: `ref_model_sync_steps`).

    Source: Gorbatovski et al. 2024, TR-DPO, arXiv 2404.09656.
    """

    mixup_alpha: float = 0.6
    sync_steps: int = 512

    scores_expire = True

    def __post_init__(self) -> None:
        if not 0 < self.mixup_alpha <= 1:
            raise ConfigError(f"reference.mixup_alpha: must be above 0 and at most 1, found {self.mixup_alpha}")
        if self.sync_steps < 1:
            raise ConfigError(f"reference.sync_steps: must be at least 1 step, found {self.sync_steps}")

    def _dtype(self) -> Optional[torch.dtype]:
        # Rounding in a half-precision copy would lose small updates.
        return torch.float32

    def after_step(self, step: int) -> None:
        if step % self.sync_steps == 0:
            self._weight_copy.ema_update(self.mixup_alpha)


@dataclass(kw_only=True)
class BaseModelReference(Reference):
    """Base model: the policy with its LoRA or DoRA adapters disabled; no copy of weights.

    Only for new adapters. Resumed adapters are part of the reference: use `CachedReference`, or `FrozenReference`,
    which copies only the adapters.
    """

    def prepare(self, trainer: Any, data: AlignDataModule, *, runs: Path, resumed: Path | None) -> dict[Split, Tensor]:
        """See `Reference.prepare`.

        Raises:
            ConfigError: the model has no adapters that can be disabled.
        """
        from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper

        chunks = trainer.strategy.megatron_parallel
        self._wrappers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, AdapterWrapper)]
        if not self._wrappers:
            raise ConfigError(
                "reference: BaseModelReference, but the model's adapters are not of a kind that can be switched off; "
                "use run.Config(CachedReference)"
            )
        return super().prepare(trainer, data, runs=runs, resumed=resumed)

    @contextlib.contextmanager
    def use_reference_model(self) -> Iterator[None]:
        for wrapper in self._wrappers:
            wrapper.forward = _forward_without_adapter(wrapper)
        try:
            yield
        finally:
            for wrapper in self._wrappers:
                del wrapper.forward


def _forward_without_adapter(wrapper: Any) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Optional[Tensor]]:
        output, bias, _ = wrapper.base_linear_forward(x, *args, **kwargs)
        return output, bias

    return forward


def _dtype(trainer: Any) -> torch.dtype:
    return compute_dtype(trainer.strategy.megatron_parallel[0].config)


HASH = "hash"
"""Key of the metadata of a cache."""


def _hash(scores: Tensor) -> str:
    """Hash scores, to find damage."""
    return xxhash.xxh3_128_hexdigest(f"{scores.dtype} {tuple(scores.shape)} ".encode() + scores.cpu().numpy().tobytes())


def _load(path: Path, trainer: Any) -> Tensor | None:
    """Read the cached scores on rank 0 and broadcast them: a file may appear later on other nodes."""
    scores: Tensor | None = None
    if trainer.is_global_zero and path.exists():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found, written = file.get_tensor("logps"), (file.metadata() or {}).get(HASH)
            if written is not None and _hash(found) != written:
                raise ValueError("is not what was written")
            scores = found
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            log_rank0(f"reference cache {path} is damaged ({error})")
    shared = [scores]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _save(scores: Tensor, path: Path, trainer: Any) -> None:
    if trainer.is_global_zero:
        with atomic_write(path) as partial:
            safetensors.torch.save_file({"logps": scores.contiguous()}, partial, {HASH: _hash(scores)})
    torch.distributed.barrier()
