"""Layers without Transformer Engine: attention over padded and packed sequences, norms for sequence parallelism.

Without Transformer Engine, Megatron's attention materializes the full score matrix and refuses packed sequences and
context parallelism; its norms refuse sequence parallelism. With Transformer Engine these layers are unused: its
attention reads the same `cu_seqlens`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from aligner.backend import context_parallel


class ScaledDotProductAttention(DotProductAttention):
    """Causal attention within each sequence: softmax(q kᵀ · scale) v."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # Upstream refuses context parallelism; this class gathers the keys of all ranks.
        super().__init__(_copy_with(config, context_parallel_size=1), *args, **kwargs)
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention: padded `[T, B, heads, d]` -> `[T, B, heads · d]`, packed `[T, heads, d]` -> same shape."""
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            if self.config.context_parallel_size > 1:
                key, value = (context_parallel.gather_keys(x, lengths) for x in (key, value))
            queries = query.split([length // self.config.context_parallel_size for length in lengths])
            parts = zip(queries, key.split(lengths), value.split(lengths), strict=True)
            # [t, heads, d] -> [1, heads, t, d]; torch's fast kernels need all four dimensions.
            contexts = [self._causal_attention(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
            return torch.cat([x[0].transpose(0, 1) for x in contexts])
        if attention_mask is not None or query.shape[0] != key.shape[0] or not self._is_plain_causal:
            assert self.config.context_parallel_size == 1, "checked where the run is configured"
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)  # type: ignore[arg-type]
        if self.config.context_parallel_size > 1:
            length = len(key) * self.config.context_parallel_size
            key, value = (context_parallel.gather_keys(x, [length]) for x in (key, value))
        context = self._causal_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    @functools.cached_property
    def _is_plain_causal(self) -> bool:
        """Whether torch's attention supports every setting of this layer."""
        return (
            self.attn_mask_type == AttnMaskType.causal
            and self.softmax_offset is None
            and self.scale_mask_softmax.window_size is None
            # `apply_query_key_layer_scaling`: Megatron divides by the layer number here and multiplies in the softmax.
            and self.scale_mask_softmax.scale is None
        )

    def _causal_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._is_plain_causal, "a packed model must attend causally, without window or softmax offset"
        dropout = self.attention_dropout.p if self.training else 0.0
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        dropout_rng = tracker.fork() if dropout else contextlib.nullcontext()
        mask, ranks = None, self.config.context_parallel_size
        if ranks > 1:
            length = key.shape[2]
            positions = context_parallel.local_positions([length]).to(key.device)
            mask = positions[:, None] >= torch.arange(length, device=key.device)
        with dropout_rng:
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=True,
            )


class Norm:
    """Torch's norm with weights marked for gradient summation over sequence-parallel ranks."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        norm: Any = WrappedTorchNorm(_copy_with(config, sequence_parallel=False), hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _copy_with(config: Any, **changes: Any) -> Any:
    """Copy a config with changed fields; `dataclasses.replace` would run `__post_init__` again."""
    config = copy.copy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


REPLACED = {DotProductAttention: ScaledDotProductAttention, WrappedTorchNorm: Norm}


def _replace_modules(spec: Any, replaced: Mapping[Any, Any]) -> None:
    """Replace layer classes in a `ModuleSpec`, in place."""
    spec.module = replaced.get(spec.module, spec.module)
    for name, part in list(vars(spec.submodules).items()) if spec.submodules is not None else []:
        if isinstance(part, ModuleSpec):
            _replace_modules(part, replaced)
        elif isinstance(part, type) and part in replaced:
            setattr(spec.submodules, name, replaced[part])


def replace_attention(config: Any, replaced: Mapping[Any, Any] = REPLACED) -> None:
    """Make a NeMo GPT config build its layers with the classes of `replaced` in place of Megatron's."""
    upstream = config.transformer_layer_spec

    def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
        spec = upstream
        if not isinstance(spec, ModuleSpec):
            takes_stage = "vp_stage" in inspect.signature(spec).parameters
            spec = spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
        spec = copy.deepcopy(spec)
        if not isinstance(spec, TransformerBlockSubmodules):
            count = get_num_layers_to_build(config, vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=LayerNormImpl)  # type: ignore[arg-type]
        for layer in spec.layer_specs or []:
            _replace_modules(layer, replaced)
        spec.layer_norm = replaced.get(spec.layer_norm, spec.layer_norm)
        return spec

    config.transformer_layer_spec = layer_spec
