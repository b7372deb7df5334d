"""Compute device of this process, and availability of Transformer Engine."""

from __future__ import annotations

import importlib.util

import torch


def no_cuda() -> bool:
    """Whether this process runs without a GPU."""
    return not torch.cuda.is_available()


def no_transformer_engine() -> bool:
    """Whether NeMo chooses Megatron's local layers."""
    return no_cuda() or importlib.util.find_spec("transformer_engine") is None


def communication_device() -> str:
    """Return the device of tensors that ranks exchange: "cuda" for NCCL, "cpu" for gloo."""
    return "cpu" if no_cuda() else "cuda"
