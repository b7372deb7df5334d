"""Key-value cache of sequences of different lengths.

Megatron's dynamic contexts need flash-attn and therefore a GPU. This context gives Megatron's layers the same results
with torch's attention: one call for a prompt (prefill), or one for the newest tokens of all slots (decode).

Dimensions: S slots, N new tokens of a pass, G key/value heads, H query heads, T longest sequence, D head size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

BLOCK = 64
"""The number of keys in an attention call is a multiple of BLOCK; keys beyond a sequence's own are masked. Masked keys
add zeros at the end of sums. At a multiple of the vector width these zeros change no bit, so a result does not depend
on the lengths of the other sequences."""


class KeyValueCache(BaseInferenceContext):
    """A cache for `slots` sequences of up to `length` tokens; the `inference_context` of a Megatron model.

    Call `expect` before a forward pass and `done` after it; `done` adds the new tokens to `lengths`.
    """

    use_flashinfer_fused_rope = False

    def __init__(self, *, slots: int, length: int) -> None:
        super().__init__(materialize_only_last_token_logits=True)
        self.max_sequence_length, self.slots = -(-length // BLOCK) * BLOCK, slots
        self.lengths = [0] * slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def expect(self, slots: list[int], counts: list[int]) -> None:
        """Prepare a pass of `counts[i]` new tokens of slot `slots[i]`, concatenated: a prompt, or a token per slot."""
        self._pass = list(zip(slots, counts, strict=True))
        positions = [torch.arange(self.lengths[slot], self.lengths[slot] + count) for slot, count in self._pass]
        self.positions_N = torch.cat(positions)
        self._slots_N = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts))
        self._last = torch.tensor(counts).cumsum(0) - 1
        self._prompt = self._pass[0] if len(slots) == 1 and not self.lengths[slots[0]] else None
        assert self._prompt or slots == list(range(self.slots)), "a pass is of one prompt, or of all slots"
        newest = int(self.positions_N.max())
        assert newest < self.max_sequence_length, "a sequence outgrew its slot"
        self._rotary: tuple[Tensor, Tensor, Tensor] | None = None
        self._num_keys = (newest // BLOCK + 1) * BLOCK
        self._masked = torch.arange(self._num_keys)[None, None, None] > self.positions_N[:, None, None, None]
        self._mask: Tensor | None = None
        self._on_device = False

    def done(self) -> None:
        """Add the tokens of the pass to `lengths`."""
        for slot, count in self._pass:
            self.lengths[slot] += count

    def free(self, slot: int) -> None:
        """Empty a slot; later tokens overwrite its keys and values."""
        self.lengths[slot] = 0

    @torch.inference_mode()
    def copy(self, slot: int, to: int, count: int) -> None:
        """Copy the first `count` tokens of `slot` to slot `to`, in place of its sequence."""
        for keys_values in self._layers.values():
            for tensor in keys_values:
                tensor[to, :, :count] = tensor[slot, :, :count]
        self.lengths[to] = count

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Compute softmax(q kᵀ · scale) v of each sequence over all its keys: `[N, 1, H, D]` -> the same shape."""
        attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True)
        if self._prompt is not None:
            slot, count = self._prompt
            keys, values = key[slot : slot + 1, :, :count], value[slot : slot + 1, :, :count]
            return attention(query.permute(1, 2, 0, 3), keys, values, is_causal=True).permute(2, 0, 1, 3)
        if self._mask is None:
            masked = self._masked.to(query.device)
            self._mask = torch.zeros_like(masked, dtype=query.dtype).masked_fill_(masked, -math.inf)
        keys, values = key[:, :, : self._num_keys], value[:, :, : self._num_keys]
        return attention(query.transpose(1, 2), keys, values, attn_mask=self._mask).transpose(1, 2)

    # ---- Megatron's interface -------------------------------------------------------------------------------------

    def is_static_batching(self) -> bool:
        return False

    def is_dynamic_batching(self) -> bool:
        """Return False: Megatron would require flash-attn."""
        return False

    def is_decode_only(self) -> bool:
        return False

    def cu_query_lengths(self) -> tuple[None, int]:
        return None, 1

    def cu_kv_lengths(self) -> tuple[None, None, int]:
        return None, None, 1

    def apply_rotary_emb_query(self, query: Tensor, emb: Tensor, config: Any, _: Any, cp_group: Any) -> Tensor:
        if self._rotary is None or self._rotary[0] is not emb:
            # The same in every layer; Megatron's own function recomputes it per layer.
            angles = emb[self.positions_N]
            self._rotary = emb, angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        _, cos, sin = self._rotary
        rotated, rest = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
        return torch.cat((rotated * cos + _rotate_half(rotated, config.rotary_interleaved) * sin, rest), dim=-1)

    def apply_rotary_emb_key(self, key: Tensor, emb: Tensor, config: Any, cp_group: Any) -> Tensor:
        return self.apply_rotary_emb_query(key, emb, config, None, cp_group)

    def append_key_value_cache(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new keys and values, `[N, 1, G, D]`."""
        if layer not in self._layers:
            shape = (self.slots, key.shape[2], self.max_sequence_length, key.shape[3])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        if not self._on_device:
            # Once per pass, not per layer.
            self._on_device = True
            for name in ("_slots_N", "positions_N", "_last"):
                setattr(self, name, getattr(self, name).to(key.device))
        for cached, new in zip(self._layers[layer], (key, value), strict=True):
            cached[self._slots_N, :, self.positions_N] = new[:, 0]

    def key_value_cache(self, layer: int) -> tuple[Tensor, Tensor, KeyValueCache]:
        """Return all keys and values, `[S, G, T, D]`, and this cache in place of Megatron's block table."""
        return (*self._layers[layer], self)

    def last_token_logits(self, hidden: Tensor) -> Tensor:
        """Select the last token of each sequence: `[1, N, hidden]` -> `[sequences, hidden]`."""
        return hidden[0, self._last]


class CachedAttention(SelfAttention):
    """Megatron's self-attention over a `KeyValueCache`."""

    def flash_decode_and_prefill(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        """Attend over the cache, the last argument. Megatron calls this method for a context that is not static."""
        cache: KeyValueCache = rest[-1]
        return cache.attend(q, k, v, self.config.softmax_scale)
