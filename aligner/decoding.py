"""Writing answers token by token, many at a time: an answer that ends makes room for the next one at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from aligner.kv_cache import KeyValueCache
from aligner.sampling import Sampling, choose

Finish = Literal["stop", "length", "special"]
"""Why an answer ended: as answers do; for want of room; with a special token that ends nothing."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What decoding must know of a tokenizer."""

    size: int
    """Ids from here on are padding of the model's, and never drawn."""
    ends: frozenset[int]
    """Tokens that end an answer properly."""
    special: frozenset[int]
    """Tokens that no answer contains."""
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is to be continued."""

    key: Any
    tokens: list[int]
    seed: int


@dataclass(kw_only=True)
class Written:
    """An answer, its end token among the tokens."""

    key: Any
    drawing: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0
    """Of the answer under the policy itself (temperature 1, all tokens), nats."""
    finish: Finish | None = None
    """None while it is being written."""
    cut_at: str | None = None
    """The stop text that ended it."""


def decode(
    model: Any,
    prompts: Iterable[Prompt],
    vocabulary: Vocabulary,
    sampling: Sampling,
    *,
    slots: int,
    length: int,
) -> Iterator[Written]:
    """Answers in the order in which they end, `slots` at a time.

    A prompt is read in a pass of its own; after that all slots make one pass a token, also those that are empty: a
    matrix product may round differently for another number of rows, and so an answer depends on its prompt and seed
    alone, bit by bit, whatever else is being written.

    Args:
        model: a Megatron GPT model whose attention is `CachedAttention`.
        prompts: with at most `length - sampling.max_tokens` tokens each.
        slots: answers that are written at the same time.
        length: tokens of the longest prompt and its answer.
    """
    cache, waiting = KeyValueCache(slots=slots, length=length), iter(prompts)
    writing: list[Written | None] = [None] * slots
    logits: list[Tensor | None] = [None] * slots
    device = next(model.parameters()).device
    while True:
        for slot in range(slots):
            if writing[slot] is None and (prompt := next(waiting, None)) is not None:
                assert len(prompt.tokens) + sampling.max_tokens <= length
                cache.free(slot)
                logits[slot] = _passed(model, cache, prompt.tokens, [slot], [len(prompt.tokens)], device)[0]
                generator = torch.Generator().manual_seed(prompt.seed)
                writing[slot] = Written(key=prompt.key, drawing=generator)
        active = [slot for slot, written in enumerate(writing) if written is not None]
        if not active:
            return
        held = [found for slot in active if (found := logits[slot]) is not None]
        _append([w for w in writing if w is not None], torch.stack(held), vocabulary, sampling)
        newest = [written.tokens[-1] if written is not None else 0 for written in writing]
        for slot in active:
            written = writing[slot]
            if written is not None and written.finish is not None:
                yield written
                writing[slot] = None
        if any(written is not None for written in writing):
            for slot in range(slots):
                if writing[slot] is None:
                    cache.free(slot)
            found = _passed(model, cache, newest, list(range(slots)), [1] * slots, device)
            logits = list(found)


def _passed(
    model: Any, cache: KeyValueCache, tokens: list[int], slots: list[int], counts: list[int], device: Any
) -> Tensor:
    """Logits after the last new token of each slot, `[len(slots), V]` float32."""
    cache.expect(slots, counts)
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=cache.positions_N[None].to(device),
            attention_mask=None,
            inference_context=cache,
            runtime_gather_output=True,
        )
    cache.done()
    return logits[0].float()


def _append(active: list[Written], logits_SV: Tensor, vocabulary: Vocabulary, sampling: Sampling) -> None:
    """Draw the next token of each, and see whether it ends there."""
    policy = logits_SV.log_softmax(dim=-1)
    allowed = logits_SV[:, : vocabulary.size]
    uniform = torch.stack([torch.rand((), generator=written.drawing, dtype=torch.float64) for written in active])
    tokens = choose(allowed, uniform, sampling)
    logps = policy.gather(1, tokens[:, None])[:, 0].tolist()
    for written, token, logp in zip(active, tokens.tolist(), logps, strict=True):
        written.tokens.append(token)
        written.logp += logp
        if token in vocabulary.ends:
            written.finish = "stop"
        elif token in vocabulary.special:
            written.finish = "special"
        elif stop := _stopped(written.tokens, vocabulary, sampling):
            written.finish, written.cut_at = "stop", stop
        elif len(written.tokens) == sampling.max_tokens:
            written.finish = "length"


def _stopped(tokens: list[int], vocabulary: Vocabulary, sampling: Sampling) -> str | None:
    """The stop text that the answer has just completed."""
    if not sampling.stop:
        return None
    # A token is a byte at least; a character up to four of them.
    tail = vocabulary.decode(tokens[-(4 * max(map(len, sampling.stop)) + 4) :])
    return next((text for text in sampling.stop if text in tail), None)
