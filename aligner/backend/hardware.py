"""Hardware-dependent settings, determined on the machine of the job and not where the recipe was written.

Recipes use `run.Config(hardware.precision_plugin)`: the function runs when the job builds its arguments.
"""

import dataclasses
import importlib.util
from typing import Any, Literal

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl

from aligner.common.errors import ConfigError

Precision = Literal["16-mixed", "bf16-mixed", "32"]


def fused_adam() -> bool:
    """Whether a GPU and Transformer Engine or Apex are available.

    Without their Adam, Megatron's distributed optimizer can be saved but not loaded
    (megatron/core/optimizer/distrib_optimizer.py: fresh states have no step).
    """
    return torch.cuda.is_available() and any(map(importlib.util.find_spec, ("transformer_engine", "apex")))


def precision_plugin(
    gpu_precision: Precision = "bf16-mixed", cpu_precision: Precision = "32"
) -> nl.MegatronMixedPrecision:
    """Create the precision plugin: by default bfloat16 with float32 gradients on a GPU, float32 on a CPU."""
    return nl.MegatronMixedPrecision(precision=gpu_precision if torch.cuda.is_available() else cpu_precision)


def optimizer_config(
    lr: float,
    weight_decay: float = 0.1,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.98,
    clip_grad: float = 1.0,
    **kwargs: Any,
) -> OptimizerConfig:
    """Configure Megatron's Adam; distributed over the data-parallel ranks where such a state can be resumed.

    `kwargs` are further fields of Megatron's OptimizerConfig.

    Raises:
        ConfigError: OptimizerConfig has no such field.
    """
    fields = [field.name for field in dataclasses.fields(OptimizerConfig)]
    for name in kwargs:
        if name not in fields:
            raise ConfigError(
                f"optim.config.{name}: Megatron's OptimizerConfig has no such field ({', '.join(fields)})"
            )
    bf16 = torch.cuda.is_available()
    kwargs.setdefault("use_distributed_optimizer", fused_adam())
    kwargs.setdefault("bf16", bf16)
    kwargs.setdefault("params_dtype", torch.bfloat16 if bf16 else torch.float32)
    return OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=weight_decay,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        clip_grad=clip_grad,
        **kwargs,
    )


def compute_dtype(config: Any) -> torch.dtype:
    """Return a Megatron model's compute dtype; `params_dtype` is float32 also for NeMo's bf16-mixed."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else config.params_dtype
