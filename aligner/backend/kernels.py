"""Kernel selection: deterministic kernels with `trainer.deterministic=True`, and attention backends.

Transformer Engine's fallbacks are settings: `model.config.attention_backend` (auto, flash, fused, unfused) sets
NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN, `model.config.masked_softmax_fusion` sets
NVTE_MASKED_SOFTMAX_FUSION.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from aligner.common.console import log_rank0
from aligner.common.errors import ConfigError

ENVIRONMENT = {
    # Excludes attention kernels with a nondeterministic summation order in backward.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # The algorithm determines the summation order; NCCL would choose it by message and topology.
    "NCCL_ALGO": "Ring",
}
ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":16:8",),
    "NCCL_ALGO": ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""Values that Megatron accepts beside `ENVIRONMENT`."""

ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
BACKENDS = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001", "local": "000"}
SOFTMAX = "NVTE_MASKED_SOFTMAX_FUSION"

SET = (*ENVIRONMENT, *ATTENTION, SOFTMAX)
"""Environment variables of a run, which must not affect the next run in the same process."""


def choose_attention(config: Any) -> None:
    """Select Transformer Engine's attention backend; Megatron sets the other variables itself.

    Raises:
        ConfigError: an environment variable contradicts the config.
    """
    backend = config.attention_backend.name
    for name, wanted in zip(ATTENTION, BACKENDS[backend], strict=True):
        value = os.environ.get(name, wanted)
        if value != wanted:
            backends = {bits: other for other, bits in BACKENDS.items()}
            requested = backends.get("".join(os.environ.get(n, "1") for n in ATTENTION), "flash, fused or unfused")
            raise ConfigError(
                f"model.config.attention_backend: {backend}, but the environment has {name}={value}; unset {name}, and "
                f"set model.config.attention_backend={requested}"
            )
    os.environ[SOFTMAX] = str(int(config.masked_softmax_fusion))


def switch_on(asked: Any, config: Any) -> None:
    """Enable deterministic mode in torch, Transformer Engine, NCCL and Megatron.

    Args:
        asked: `trainer.deterministic`: True, or "warn" to warn of operations without a deterministic kernel.
        config: model config.

    Raises:
        ConfigError: an environment variable contradicts deterministic mode.
    """
    # Lightning did this when it created the trainer; an earlier stage may have undone it.
    torch.use_deterministic_algorithms(True, warn_only=asked == "warn")
    for name, value in ENVIRONMENT.items():
        current = os.environ.setdefault(name, value)
        if current != value and current not in ALLOWED.get(name, ()):
            raise ConfigError(
                f"trainer.deterministic: True, but the environment has {name}={current}; unset it, or set it to {value}"
            )
    config.deterministic_mode = True
    # The fused kernel sums with atomics.
    config.cross_entropy_loss_fusion = False
    variables = ", ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT)
    log_rank0(f"deterministic: torch.use_deterministic_algorithms, Megatron's deterministic_mode, {variables}")


def switch_off() -> None:
    """Disable torch's deterministic mode after a run; Lightning does not."""
    torch.use_deterministic_algorithms(False)
