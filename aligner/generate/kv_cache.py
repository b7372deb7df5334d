"""Keys and values of sequences that are being written, each of its own length.

Megatron's dynamic contexts need flash-attn and therefore a GPU; this one gives Megatron's layers the same answers from
torch's attention: a call for a prompt, and one for the newest tokens of all slots.

Dimensions: S slots, N new tokens of a pass, G key/value heads, H query heads, T the longest sequence, D a head's size.
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
"""Keys are attended to in multiples of so many, the last of them masked. What is masked adds zeros at the end of sums,
and at a multiple of a vector's width these change no bit: how long the neighbors are does not matter."""


class KeyValueCache(BaseInferenceContext):
    """Room for `slots` sequences of up to `length` tokens; the `inference_context` of a Megatron model.

    `expect` says what the next pass brings; after it `lengths` counts it.
    """

    use_flashinfer_fused_rope = False

    def __init__(self, *, slots: int, length: int) -> None:
        super().__init__(materialize_only_last_token_logits=True)
        self.max_sequence_length, self.slots = -(-length // BLOCK) * BLOCK, slots
        self.lengths = [0] * slots
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def expect(self, slots: list[int], counts: list[int]) -> None:
        """The next pass has `counts[i]` new tokens of slot `slots[i]`, end to end: a prompt, or one token of each."""
        self._coming = list(zip(slots, counts, strict=True))
        at = [torch.arange(self.lengths[slot], self.lengths[slot] + count) for slot, count in self._coming]
        self.positions_N = torch.cat(at)
        self._slots_N = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts))
        self._last = torch.tensor(counts).cumsum(0) - 1
        self._prompt = self._coming[0] if len(slots) == 1 and not self.lengths[slots[0]] else None
        assert self._prompt or slots == list(range(self.slots)), "a pass is of one prompt, or of all slots"
        newest = int(self.positions_N.max())
        assert newest < self.max_sequence_length, "a sequence outgrew its slot"
        self._rotary: tuple[Tensor, Tensor, Tensor] | None = None
        self._reach = (newest // BLOCK + 1) * BLOCK
        self._unseen = torch.arange(self._reach)[None, None, None] > self.positions_N[:, None, None, None]
        self._mask: Tensor | None = None
        self._placed = False

    def done(self) -> None:
        """The pass is over."""
        for slot, count in self._coming:
            self.lengths[slot] += count

    def free(self, slot: int) -> None:
        """What it holds will be written over."""
        self.lengths[slot] = 0

    @torch.inference_mode()
    def copy(self, slot: int, to: int, count: int) -> None:
        """Begin anew in slot `to`, with the first `count` tokens of `slot`."""
        for held in self._held.values():
            for tensor in held:
                tensor[to, :, :count] = tensor[slot, :, :count]
        self.lengths[to] = count

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Softmax(q kᵀ · scale) v of each sequence over all its keys: `[N, 1, H, D]` -> the same shape."""
        attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True)
        if self._prompt is not None:
            slot, count = self._prompt
            keys, values = key[slot : slot + 1, :, :count], value[slot : slot + 1, :, :count]
            return attention(query.permute(1, 2, 0, 3), keys, values, is_causal=True).permute(2, 0, 1, 3)
        if self._mask is None:
            unseen = self._unseen.to(query.device)
            self._mask = torch.zeros_like(unseen, dtype=query.dtype).masked_fill_(unseen, -math.inf)
        keys, values = key[:, :, : self._reach], value[:, :, : self._reach]
        return attention(query.transpose(1, 2), keys, values, attn_mask=self._mask).transpose(1, 2)

    # ---- what Megatron asks ---------------------------------------------------------------------------------------

    def is_static_batching(self) -> bool:
        return False

    def is_dynamic_batching(self) -> bool:
        """Megatron would demand flash-attn."""
        return False

    def is_decode_only(self) -> bool:
        return False

    def cu_query_lengths(self) -> tuple[None, int]:
        return None, 1

    def cu_kv_lengths(self) -> tuple[None, None, int]:
        return None, None, 1

    def apply_rotary_emb_query(self, query: Tensor, emb: Tensor, config: Any, _: Any, cp_group: Any) -> Tensor:
        if self._rotary is None or self._rotary[0] is not emb:
            # The same in every layer; Megatron's own function computes it anew.
            angles = emb[self.positions_N]
            self._rotary = emb, angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        _, cos, sin = self._rotary
        turned, rest = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
        return torch.cat((turned * cos + _rotate_half(turned, config.rotary_interleaved) * sin, rest), dim=-1)

    def apply_rotary_emb_key(self, key: Tensor, emb: Tensor, config: Any, cp_group: Any) -> Tensor:
        return self.apply_rotary_emb_query(key, emb, config, None, cp_group)

    def append_key_value_cache(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep what is new, `[N, 1, G, D]`."""
        if layer not in self._held:
            shape = (self.slots, key.shape[2], self.max_sequence_length, key.shape[3])
            self._held[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        if not self._placed:
            # Once a pass, not in every layer.
            self._placed = True
            for name in ("_slots_N", "positions_N", "_last"):
                setattr(self, name, getattr(self, name).to(key.device))
        for held, new in zip(self._held[layer], (key, value), strict=True):
            held[self._slots_N, :, self.positions_N] = new[:, 0]

    def key_value_cache(self, layer: int) -> tuple[Tensor, Tensor, KeyValueCache]:
        """All keys and values, `[S, G, T, D]`, and where Megatron has a table of blocks, this."""
        return (*self._held[layer], self)

    def last_token_logits(self, hidden: Tensor) -> Tensor:
        """Of each sequence's last token: `[1, N, hidden]` -> `[sequences, hidden]`."""
        return hidden[0, self._last]


class CachedAttention(SelfAttention):
    """Megatron's self-attention, over a `KeyValueCache`."""

    def flash_decode_and_prefill(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        """What Megatron calls for a context that is not static; the last of its arguments is `key_value_cache`'s."""
        cache: KeyValueCache = rest[-1]
        return cache.attend(q, k, v, self.config.softmax_scale)
