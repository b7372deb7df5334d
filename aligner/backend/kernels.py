"""Which kernels compute: deterministic ones with `trainer.deterministic=True`, and those of attention.

The fall-backs of Transformer Engine are settings: `model.config.attention_backend` (auto, flash, fused, unfused) stands
for NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN, `model.config.masked_softmax_fusion` for
NVTE_MASKED_SOFTMAX_FUSION.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from aligner.common.console import log_rank0
from aligner.common.errors import ConfigError

ENVIRONMENT = {
    # Attention kernels whose backward adds up in no fixed order.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Another algorithm adds up in another order, and NCCL chooses by message and topology.
    "NCCL_ALGO": "Ring",
}
ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":16:8",),
    "NCCL_ALGO": ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""What Megatron accepts beside our own choice."""


ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
BACKENDS = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001", "local": "000"}
SOFTMAX = "NVTE_MASKED_SOFTMAX_FUSION"

SET = (*ENVIRONMENT, *ATTENTION, SOFTMAX)
"""What is set in the environment of a run, and must not reach the next one in the same process."""


def choose_attention(config: Any) -> None:
    """Tell Transformer Engine which attention to take; Megatron sets the other variables itself.

    Raises:
        ConfigError: the environment was told otherwise.
    """
    backend = config.attention_backend.name
    for name, wanted in zip(ATTENTION, BACKENDS[backend], strict=True):
        held = os.environ.get(name, wanted)
        if held != wanted:
            others = {"".join(bits): other for other, bits in BACKENDS.items()}
            asked = others.get("".join(os.environ.get(n, "1") for n in ATTENTION), "flash, fused or unfused")
            raise ConfigError(
                f"model.config.attention_backend: {backend}, but the environment has {name}={held}; unset {name}, and "
                f"set model.config.attention_backend={asked}"
            )
    os.environ[SOFTMAX] = str(int(config.masked_softmax_fusion))


def switch_on(asked: Any, config: Any) -> None:
    """Have torch, Transformer Engine, NCCL and Megatron compute the same in every run.

    Args:
        asked: `trainer.deterministic`: True, or "warn" where torch is to warn of an operation that has no such kernel.
        config: the model's.

    Raises:
        ConfigError: the environment demands the opposite.
    """
    # Lightning did so when the trainer was made; a stage before this one may have undone it.
    torch.use_deterministic_algorithms(True, warn_only=asked == "warn")
    for name, value in ENVIRONMENT.items():
        held = os.environ.setdefault(name, value)
        if held != value and held not in ALLOWED.get(name, ()):
            raise ConfigError(
                f"trainer.deterministic: True, but the environment has {name}={held}; unset it, or set it to {value}"
            )
    config.deterministic_mode = True
    # Its fused kernel adds up with atomics.
    config.cross_entropy_loss_fusion = False
    shown = ", ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT)
    log_rank0(f"deterministic: torch.use_deterministic_algorithms, Megatron's deterministic_mode, {shown}")


def switch_off() -> None:
    """Leave torch as a run found it; Lightning does not."""
    torch.use_deterministic_algorithms(False)
