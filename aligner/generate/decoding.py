"""Writing answers token by token, many at a time: an answer that ends makes room for the next one at once."""

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
"""Why an answer ended: as answers do; for want of room; with a special token that ends nothing."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What decoding must know of a tokenizer."""

    size: int
    """Ids from here on are padding of the model's, and never drawn."""
    stop_token_ids: frozenset[int]
    """Tokens that end an answer properly."""
    special: frozenset[int]
    """Tokens that no answer contains."""
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """What is to be continued."""

    key: Any
    tokens: list[int]
    seed: int


@dataclass(kw_only=True)
class DecodedSequence:
    """An answer, its end token among the tokens."""

    key: Any
    drawing: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0
    """Of the answer under the policy itself (temperature 1, all tokens), nats."""
    finish_reason: Finish | None = None
    """None while it is being written."""
    cut_at: str | None = None
    """The stop text that ended it."""


@dataclass
class _Slot:
    """A place in which answers are written one after another."""

    written: DecodedSequence | None = None
    prompt: list[int] | None = None
    """What its part of the cache begins with, also after its answer has ended."""
    first: Tensor | None = None
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
    """Answers in the order in which they end, `slots` at a time.

    A prompt is read in a pass of its own, or taken from a slot that holds the same one. After that all slots make one
    pass a token, also those that are empty: a matrix product may round differently for another number of rows, and so
    an answer depends on its prompt and seed alone, bit by bit, whatever else is being written.

    Args:
        model: a Megatron GPT model whose attention is `CachedAttention`.
        prompts: with at most `length - sampling.max_tokens` tokens each.
        slots: answers that are written at the same time.
        length: tokens of the longest prompt and its answer.
    """
    cache, waiting = KeyValueCache(slots=slots, length=length), iter(prompts)
    places = [_Slot() for _ in range(slots)]
    drawing = _begun(model, cache, places, waiting)
    while drawing:
        _draw(drawing, vocabulary, sampling)
        for slot in drawing:
            if slot.written is not None and slot.written.finish_reason is not None:
                yield slot.written
                slot.written = None
        # Those that begin draw their first token before the others go on, so that no pass has an empty slot too many.
        drawing = _begun(model, cache, places, waiting) or _went_on(model, cache, places)


def _begun(model: Any, cache: KeyValueCache, places: list[_Slot], waiting: Iterator[DecodeRequest]) -> list[_Slot]:
    """Slots that were empty and have read a prompt."""
    found = []
    for number, slot in enumerate(places):
        if slot.written is None and (prompt := next(waiting, None)) is not None:
            assert len(prompt.tokens) < cache.max_sequence_length
            _read(model, cache, places, number, prompt.tokens)
            slot.written = DecodedSequence(key=prompt.key, drawing=torch.Generator().manual_seed(prompt.seed))
            found.append(slot)
    return found


def _went_on(model: Any, cache: KeyValueCache, places: list[_Slot]) -> list[_Slot]:
    """Slots in which something is being written, after a pass over the newest token of each."""
    active = [slot for slot in places if slot.written is not None]
    if active:
        for number, slot in enumerate(places):
            if slot.written is None:
                cache.free(number)
                slot.prompt = None
        newest = [slot.written.tokens[-1] if slot.written else 0 for slot in places]
        found = _passed(model, cache, newest, range(len(places)), [1] * len(places))
        for slot, logits in zip(places, found, strict=True):
            slot.logits = logits
    return active


def _read(model: Any, cache: KeyValueCache, places: list[_Slot], number: int, tokens: list[int]) -> None:
    """Have a slot hold a prompt."""
    slot = places[number]
    same = next((i for i, other in enumerate(places) if other.prompt == tokens), None)
    if same is None:
        cache.free(number)
        slot.first = _passed(model, cache, tokens, [number], [len(tokens)])[0]
    else:
        cache.copy(same, number, len(tokens))
        slot.first = places[same].first
    slot.prompt, slot.logits = tokens, slot.first


def _passed(model: Any, cache: KeyValueCache, tokens: list[int], slots: Sequence[int], counts: list[int]) -> Tensor:
    """Logits after the last new token of each slot, `[len(slots), V]` float32."""
    cache.expect(list(slots), counts)
    device = next(model.parameters()).device
    with torch.inference_mode(), patches.undisturbed():
        logits = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=cache.positions_N[None].to(device),
            attention_mask=None,
            inference_context=cache,
            runtime_gather_output=True,
        )
    cache.done()
    return logits[0].float()


def _draw(slots: list[_Slot], vocabulary: Vocabulary, sampling: Sampling) -> None:
    """The next token of each, and whether it ends there."""
    active = [slot.written for slot in slots if slot.written is not None]
    logits_SV = torch.stack([slot.logits for slot in slots if slot.logits is not None])
    policy = logits_SV.log_softmax(dim=-1)
    allowed = logits_SV[:, : vocabulary.size]
    uniform = torch.stack([torch.rand((), generator=written.drawing, dtype=torch.float64) for written in active])
    tokens = sample_tokens(allowed, uniform, sampling)
    logps = policy.gather(1, tokens[:, None])[:, 0].tolist()
    for written, token, logp in zip(active, tokens.tolist(), logps, strict=True):
        written.tokens.append(token)
        written.logp += logp
        if token in vocabulary.stop_token_ids:
            written.finish_reason = "stop"
        elif token in vocabulary.special:
            written.finish_reason = "special"
        elif stop := _stopped(written.tokens, vocabulary, sampling):
            written.finish_reason, written.cut_at = "stop", stop
        elif len(written.tokens) == sampling.max_tokens:
            written.finish_reason = "length"


def _stopped(tokens: list[int], vocabulary: Vocabulary, sampling: Sampling) -> str | None:
    """The stop text that the answer has just completed."""
    if not sampling.stop:
        return None
    # A token is a byte at least; a character up to four of them.
    tail = vocabulary.decode(tokens[-(4 * max(map(len, sampling.stop)) + 4) :])
    return next((text for text in sampling.stop if text in tail), None)
