"""Decoding with continuous batching: a sequence that ends frees its slot for the next request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from aligner.backend import patches
from aligner.generate.kv_cache import KeyValueCache
from aligner.generate.sampling import Sampling, sample_tokens

Finish = Literal["stop", "length", "special"]
"""Why a sequence ended: a stop token or stop string; `max_tokens`; a special token that is no stop token."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokenizer properties that decoding needs."""

    size: int
    """Number of token ids. Ids from `size` on are padding of the model's vocabulary and are never sampled."""
    stop_token_ids: frozenset[int]
    """Tokens that end a sequence with `finish_reason` `stop`."""
    special: frozenset[int]
    """Tokens that no response contains."""
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """A tokenized prompt."""

    key: Any
    tokens: list[int]
    seed: int
    endings: tuple[tuple[int, ...], ...] = ()
    """Token sequences, each with a stop token at its end; the likeliest is written where the sequence would stop."""
    lacking: Callable[[list[int]], bool] = lambda tokens: True
    """Whether a sequence, without its stop token, gets an ending."""


@dataclass(kw_only=True)
class DecodedSequence:
    """A generated sequence; `tokens` includes the end token."""

    request: DecodeRequest
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0
    """Log-probability of the sequence under the policy itself (temperature 1, all tokens), nats; without an ending."""
    ending_begin: int | None = None
    """Number of tokens before the ending; None without one."""
    finish_reason: Finish | None = None
    """None while the sequence is being generated."""
    stop_text: str | None = None
    """The stop string that ended the sequence."""


@dataclass
class _Slot:
    """A row of the cache, used by one sequence after another."""

    sequence: DecodedSequence | None = None
    prompt: list[int] | None = None
    """Prompt in the slot's part of the cache. The prompt stays there after its sequence has ended."""
    prompt_logits: Tensor | None = None
    """Logits after the prompt."""
    logits: Tensor | None = None
    """Logits after the last token."""


def decode(
    model: Any,
    prompts: Iterable[DecodeRequest],
    vocabulary: Vocabulary,
    sampling: Sampling,
    *,
    slots: int,
    length: int,
) -> Iterator[DecodedSequence]:
    """Generate `slots` sequences at a time; yield each when it ends.

    A prompt takes a prefill pass of its own, or is copied from a slot with the same prompt. Each later pass adds a
    token to every slot, empty slots included. A matrix product may round differently for another number of rows; with
    a constant number, a sequence depends on its prompt and seed alone, bit for bit.

    Args:
        model: a Megatron GPT model whose attention is `CachedAttention`.
        prompts: requests of at most `length - sampling.max_tokens` tokens each, their longest ending included.
        slots: number of sequences decoded at the same time.
        length: number of tokens of the longest prompt with its response.
    """
    cache, pending = KeyValueCache(slots=slots, length=length), iter(prompts)
    all_slots = [_Slot() for _ in range(slots)]
    ready = _start_sequences(model, cache, all_slots, pending)
    while ready:
        _sample_next(ready, vocabulary, sampling)
        for slot in ready:
            if slot.sequence is not None and slot.sequence.finish_reason is not None:
                yield slot.sequence
                slot.sequence = None
        # New sequences sample their first token before the others advance, so no pass has an avoidable empty slot.
        ready = _start_sequences(model, cache, all_slots, pending) or _advance_sequences(model, cache, all_slots)


def _start_sequences(
    model: Any, cache: KeyValueCache, all_slots: list[_Slot], pending: Iterator[DecodeRequest]
) -> list[_Slot]:
    """Fill empty slots with the next prompts; return these slots."""
    started = []
    for index, slot in enumerate(all_slots):
        if slot.sequence is None and (prompt := next(pending, None)) is not None:
            assert len(prompt.tokens) < cache.max_sequence_length
            _prefill(model, cache, all_slots, index, prompt.tokens)
            slot.sequence = DecodedSequence(request=prompt, generator=torch.Generator().manual_seed(prompt.seed))
            started.append(slot)
    return started


def _advance_sequences(model: Any, cache: KeyValueCache, all_slots: list[_Slot]) -> list[_Slot]:
    """Run a pass over the newest token of each slot; return the slots with a sequence."""
    active = [slot for slot in all_slots if slot.sequence is not None]
    if active:
        for index, slot in enumerate(all_slots):
            if slot.sequence is None:
                cache.free(index)
                slot.prompt = None
        newest = [slot.sequence.tokens[-1] if slot.sequence else 0 for slot in all_slots]
        logits_SV = _passed(model, cache, newest, range(len(all_slots)), [1] * len(all_slots))
        for slot, logits in zip(all_slots, logits_SV, strict=True):
            slot.logits = logits
    return active


def _prefill(model: Any, cache: KeyValueCache, all_slots: list[_Slot], index: int, tokens: list[int]) -> None:
    """Put a prompt into a slot: copy it from another slot, or prefill."""
    slot = all_slots[index]
    source = next((i for i, other in enumerate(all_slots) if other.prompt == tokens), None)
    if source is None:
        cache.free(index)
        slot.prompt_logits = _passed(model, cache, tokens, [index], [len(tokens)])[0]
    else:
        cache.copy(source, index, len(tokens))
        slot.prompt_logits = all_slots[source].prompt_logits
    slot.prompt, slot.logits = tokens, slot.prompt_logits


def _passed(model: Any, cache: KeyValueCache, tokens: list[int], slots: Sequence[int], counts: list[int]) -> Tensor:
    """Run the model; return the logits after the last new token of each slot, `[len(slots), V]` float32."""
    cache.expect(list(slots), counts)
    device = next(model.parameters()).device
    with torch.inference_mode(), patches.without_cuda_as_cpu():
        logits = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=cache.positions_N[None].to(device),
            attention_mask=None,
            inference_context=cache,
            runtime_gather_output=True,
        )
    cache.done()
    return logits[0].float()


def _sample_next(slots: list[_Slot], vocabulary: Vocabulary, sampling: Sampling) -> None:
    """Sample the next token of each slot, and set `finish_reason` where the sequence ends."""
    active = [slot.sequence for slot in slots if slot.sequence is not None]
    logits_SV = torch.stack([slot.logits for slot in slots if slot.logits is not None])
    logp_SV = logits_SV.log_softmax(dim=-1)
    allowed_SV = logits_SV[:, : vocabulary.size]
    uniform_S = torch.stack([torch.rand((), generator=sequence.generator, dtype=torch.float64) for sequence in active])
    tokens = sample_tokens(allowed_SV, uniform_S, sampling)
    logps = logp_SV.gather(1, tokens[:, None])[:, 0].tolist()
    for i, (sequence, token, logp) in enumerate(zip(active, tokens.tolist(), logps, strict=True)):
        stops = sequence.ending_begin is None and token in vocabulary.stop_token_ids
        if stops and sequence.request.endings and sequence.request.lacking(sequence.tokens):
            sequence.ending_begin = len(sequence.tokens)
        if sequence.ending_begin is not None:
            sequence.tokens.append(_next_of_ending(sequence, logp_SV[i]))
            if tuple(sequence.tokens[sequence.ending_begin :]) in sequence.request.endings:
                sequence.finish_reason = "stop"
            continue
        sequence.tokens.append(token)
        sequence.logp += logp
        if token in vocabulary.stop_token_ids:
            sequence.finish_reason = "stop"
        elif token in vocabulary.special:
            sequence.finish_reason = "special"
        elif stop := _completed_stop_text(sequence.tokens, vocabulary, sampling):
            sequence.finish_reason, sequence.stop_text = "stop", stop
        elif len(sequence.tokens) == sampling.max_tokens:
            sequence.finish_reason = "length"


def _next_of_ending(sequence: DecodedSequence, logp_V: Tensor) -> int:
    """Return the likeliest token that continues one of the endings."""
    written = tuple(sequence.tokens[sequence.ending_begin :])
    allowed = {ids[len(written)] for ids in sequence.request.endings if ids[: len(written)] == written}
    return max(sorted(allowed), key=lambda token: float(logp_V[token]))


def _completed_stop_text(tokens: list[int], vocabulary: Vocabulary, sampling: Sampling) -> str | None:
    """Return the stop string that the newest token completes, or None."""
    if not sampling.stop:
        return None
    # A token has at least one byte, a character at most four.
    tail = vocabulary.decode(tokens[-(4 * max(map(len, sampling.stop)) + 4) :])
    return next((text for text in sampling.stop if text in tail), None)
