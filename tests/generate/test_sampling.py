"""Choosing a token, against hand arithmetic."""

import math

import pytest
import torch

from aligner.common.errors import ConfigError
from aligner.generate.sampling import Sampling, sample_tokens, seed_of

# Probabilities 0.5, 0.3, 0.15, 0.05, not in order.
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


def drawn(uniform: float, **settings: float) -> int:
    return int(sample_tokens(LOGITS, torch.tensor([uniform]), Sampling(**settings)))  # type: ignore[arg-type]


def test_the_likeliest() -> None:
    assert drawn(0.99, temperature=0) == 1


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.149, 0), (0.151, 1), (0.649, 1), (0.66, 2), (0.71, 3), (0.999, 3)]
)
def test_inversion_over_all_tokens(uniform: float, token: int) -> None:
    assert drawn(uniform) == token


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"top_k": 2}, {1: 0.625, 3: 0.375}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_p": 0.8}, {1: 0.625, 3: 0.375}),
        # The token that reaches p belongs to it.
        ({"top_p": 0.81}, {1: 0.5 / 0.95, 3: 0.3 / 0.95, 0: 0.15 / 0.95}),
        ({"top_p": 0.1}, {1: 1.0}),
        # First k, then p of what is left: 0.625 of two is above 0.6.
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),
        # Squares of the probabilities: 0.25, 0.09, 0.0225, 0.0025 over 0.365.
        ({"temperature": 0.5}, {1: 0.25 / 0.365, 3: 0.09 / 0.365, 0: 0.0225 / 0.365, 2: 0.0025 / 0.365}),
    ],
)
def test_shares(settings: dict[str, float], shares: dict[int, float]) -> None:
    many = 20_000
    uniform = (torch.arange(many) + 0.5) / many
    tokens = sample_tokens(LOGITS.expand(many, 4), uniform, Sampling(**settings))  # type: ignore[arg-type]
    found = {int(t): float((tokens == t).double().mean()) for t in tokens.unique()}
    assert found.keys() == shares.keys()
    for token, share in shares.items():
        assert found[token] == pytest.approx(share, abs=2 / many)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be 0"), ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p: must be above 0"), ({"top_p": 1.1}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"), ({"stop": ""}, "stop: must be a text, or a list"),
        ({"stop": ("",)}, "stop"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_from_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_seeds_differ_and_stay() -> None:
    assert seed_of(1, "a", 2) == seed_of(1, "a", 2)
    assert len({seed_of(1, name, i) for name in ("a", "b", "a1") for i in range(11)}) == 33
    assert 0 <= seed_of("x") < 2**63


def test_a_string_is_one_stop() -> None:
    assert Sampling(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
