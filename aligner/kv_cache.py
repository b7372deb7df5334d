"""Keys and values of sequences that are being written, each of its own length.

Megatron's dynamic contexts need flash-attn and therefore a GPU; this one gives Megatron's layers the same answers from
torch's attention, a call for each sequence, so that what is computed for one does not depend on its neighbours.

Dimensions: S slots, N new tokens of a pass, G key/value heads, H query heads, T the longest sequence, D a head's size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class KeyValueCache(BaseInferenceContext):
    """Room for `slots` sequences of up to `length` tokens; the `inference_context` of a Megatron model.

    `expect` says what the next pass brings; after it `lengths` counts it.
    """

    use_flashinfer_fused_rope = False

    def __init__(self, *, slots: int, length: int) -> None:
        super().__init__(materialize_only_last_token_logits=True)
        self.max_sequence_length, self.slots = length, slots
        self.lengths = [0] * slots
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def expect(self, slots: list[int], counts: list[int]) -> None:
        """The next pass has `counts[i]` new tokens of slot `slots[i]`, end to end."""
        self._coming = list(zip(slots, counts, strict=True))
        at = [torch.arange(self.lengths[slot], self.lengths[slot] + count) for slot, count in self._coming]
        self.positions_N = torch.cat(at)
        self._slots_N = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts))
        self._last = torch.tensor(counts).cumsum(0) - 1
        assert int(self.positions_N.max()) < self.max_sequence_length, "a sequence outgrew its slot"

    def done(self) -> None:
        """The pass is over."""
        for slot, count in self._coming:
            self.lengths[slot] += count

    def free(self, slot: int) -> None:
        """What it holds will be written over."""
        self.lengths[slot] = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Softmax(q kᵀ · scale) v of each sequence over all its keys: `[N, 1, H, D]` -> the same shape."""
        found, begin = [], 0
        for slot, count in self._coming:
            new, before = query[begin : begin + count, 0].transpose(0, 1)[None], self.lengths[slot]
            assert count == 1 or not before, "a prompt comes in one piece"
            held = slice(0, before + count)
            answer = torch.nn.functional.scaled_dot_product_attention(
                new, key[slot : slot + 1, :, held], value[slot : slot + 1, :, held],
                is_causal=count > 1, scale=scale, enable_gqa=True,
            )  # fmt: skip
            found.append(answer[0].transpose(0, 1))
            begin += count
        return torch.cat(found).unsqueeze(1)

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
        return apply_rotary_pos_emb(query, emb[self.positions_N], config=config, cp_group=cp_group)

    def apply_rotary_emb_key(self, key: Tensor, emb: Tensor, config: Any, cp_group: Any) -> Tensor:
        return self.apply_rotary_emb_query(key, emb, config, None, cp_group)

    def append_key_value_cache(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep what is new, `[N, 1, G, D]`."""
        if layer not in self._held:
            shape = (self.slots, key.shape[2], self.max_sequence_length, key.shape[3])
            self._held[layer] = (key.new_zeros(shape), value.new_zeros(shape))
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
