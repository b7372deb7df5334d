"""Sampling of the next token.

Dimensions: S sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: nucleus sampling threshold; 1: all tokens.
        top_k: number of likeliest tokens to sample from; 0: all.
        max_tokens: maximum number of tokens of a response, including the end token.
        stop: strings that end a response; the response does not include them.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        )
        for name, valid, expected in bounds:
            if not valid:
                raise ConfigError(f"{name}: must be {expected}, found {getattr(self, name)}")
        # A list becomes a tuple: settings are compared when a file is continued.
        object.__setattr__(self, "stop", as_stops(self.stop))


def as_stops(stop: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the strings that end a response; a string is one of them.

    Raises:
        ConfigError: one is empty, or no string.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise ConfigError(f"stop: must be a text, or a list of texts, that are not empty; found {stop!r}")
    return stops


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on `parts` alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_tokens(logits_SV: Tensor, uniform_S: Tensor, sampling: Sampling) -> Tensor:
    """Sample a token of each sequence, `[S]`, by inversion: the first whose cumulative probability exceeds `uniform_S`.

    p ∝ softmax(logits / temperature), first over the `top_k` likeliest tokens, then over the fewest of these whose
    probabilities add up to `top_p` (Holtzman et al. 2020, arXiv 1904.09751, equation 2): the order of Hugging Face's
    `generate`.
    """
    if sampling.temperature == 0:
        return logits_SV.argmax(dim=-1)
    scaled = logits_SV.double() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return _invert(scaled.softmax(dim=-1), uniform_S)
    top_k = min(sampling.top_k or scaled.shape[1], scaled.shape[1])
    top_logits, tokens = scaled.topk(top_k, dim=-1)
    probabilities = top_logits.softmax(dim=-1)
    preceding = probabilities.cumsum(dim=-1) - probabilities
    probabilities = torch.where(preceding < sampling.top_p, probabilities, 0.0)
    return tokens.gather(1, _invert(probabilities, uniform_S)[:, None])[:, 0]


def _invert(weights_SV: Tensor, uniform_S: Tensor) -> Tensor:
    cumulative = weights_SV.cumsum(dim=-1)
    beyond = cumulative > uniform_S.to(cumulative)[:, None] * cumulative[:, -1:]
    return beyond.int().argmax(dim=-1)
