"""Attention without Transformer Engine, over padded and packed sequences: torch's scaled_dot_product_attention.

Megatron's own attention for such machines builds the whole matrix of scores and refuses packed sequences. With
Transformer Engine nothing of this is used: its attention reads the same bounds.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class ScaledDotProductAttention(DotProductAttention):
    """Softmax(q kᵀ · scale) v, causal, each sequence for itself."""

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
        """Padded: `[T, B, heads, d]` -> `[T, B, heads · d]`; packed: `[T, heads, d]` -> the same shape."""
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            # [t, heads, d] -> [1, heads, t, d]; torch's fast kernels want all four.
            found = [self._causal(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
            return torch.cat([x[0].transpose(0, 1) for x in found])
        if attention_mask is not None or query.shape[0] != key.shape[0] or not self._plain:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)  # type: ignore[arg-type]
        context = self._causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    @functools.cached_property
    def _plain(self) -> bool:
        """Whether nothing is asked for that torch's attention does not know."""
        return (
            self.attn_mask_type == AttnMaskType.causal
            and self.softmax_offset is None
            and self.scale_mask_softmax.window_size is None
            # Megatron divides by the layer's number here and multiplies by it in the softmax.
            and self.scale_mask_softmax.scale is None
        )

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._plain, "a packed model must attend causally, without window or softmax offset"
        dropout = self.attention_dropout.p if self.training else 0.0
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        drawing = tracker.fork() if dropout else contextlib.nullcontext()
        with drawing:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )


def use_in(config: Any) -> None:
    """Have a NeMo GPT config build its layers with this attention wherever it would take Megatron's own."""
    upstream = config.transformer_layer_spec

    def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
        spec = upstream
        if not isinstance(spec, ModuleSpec):
            takes_stage = "vp_stage" in inspect.signature(spec).parameters
            spec = spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
        spec = copy.deepcopy(spec)
        for layer in getattr(spec, "layer_specs", [spec]):
            parts = layer.submodules.self_attention.submodules
            if parts.core_attention is DotProductAttention:
                parts.core_attention = ScaledDotProductAttention
        return spec

    config.transformer_layer_spec = layer_spec
