"""Which answers become a pair: the best against the worst, or none and why.

Self-rewarding (Yuan et al. 2024, arXiv 2401.10020, section 2.2) takes the highest and the lowest score; meta-rewarding
(Wu et al. 2024, arXiv 2407.19594, section 2.2) the shortest of the high ones and the longest of the low ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aligner.common.errors import ConfigError

Reason = Literal["unended", "unparsed", "identical", "tied"]
"""Why a prompt gives no pair: fewer than two answers ended properly; of these, fewer than two have a score that could
be read; all say the same; all scores are equal."""


ROUNDING = 1e-6
"""Means that differ by no more are equal."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One answer to a prompt, and what it was judged."""

    key: str
    text: str
    length: int
    """Tokens."""
    ended: bool = True
    """Whether it ended properly."""
    scores: tuple[float, ...] = field(default=())
    """Of the judgments that could be read."""

    @property
    def score(self) -> float:
        """Mean of the judgments."""
        return statistics.fmean(self.scores)

    @property
    def variance(self) -> float:
        """Of the judgments, over their number."""
        return statistics.pvariance(self.scores)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A pair, or the reason why there is none."""

    chosen: Candidate | None = None
    rejected: Candidate | None = None
    reason: Reason | None = None


def select(candidates: Iterable[Candidate], *, length_control: float = 0.0) -> Selection:
    """Best against worst of the answers to one prompt.

    With ρ = `length_control`, S⁺ and S⁻ the highest and the lowest mean score: chosen is the shortest answer with a
    score of at least (1-ρ)S⁺ + ρS⁻, rejected the longest with one of at most (1-ρ)S⁻ + ρS⁺. With ρ = 0 these are the
    best and the worst, and of several the one that the judgments agree on most. Answers that did not end, or have no
    score, take no part; answers with the same text are one, with the judgments of all.

    Raises:
        ConfigError: ρ is not in [0, 0.5), where no answer could be both.
    """
    check_control(length_control)
    ended = [candidate for candidate in candidates if candidate.ended]
    judged = [candidate for candidate in ended if candidate.scores]
    for found, reason in ((ended, "unended"), (judged, "unparsed")):
        if len(found) < 2:
            return Selection(reason=reason)  # type: ignore[arg-type]
    distinct = _merged(judged)
    if len(distinct) < 2:
        return Selection(reason="identical")
    high, low = (pick(candidate.score for candidate in distinct) for pick in (max, min))
    if high - low <= ROUNDING:
        return Selection(reason="tied")
    slack = length_control * (high - low)
    # The bounds themselves count, whatever the last bit of a mean is.
    good = [candidate for candidate in distinct if candidate.score >= high - slack - ROUNDING / 4]
    bad = [candidate for candidate in distinct if candidate.score <= low + slack + ROUNDING / 4]
    if length_control:
        chosen = min(good, key=lambda c: (c.length, -c.score, c.variance))
        rejected = min(bad, key=lambda c: (-c.length, c.score, c.variance))
    else:
        chosen, rejected = (min(found, key=lambda c: c.variance) for found in (good, bad))
    return Selection(chosen=chosen, rejected=rejected)


def check_control(length_control: float) -> None:
    """See that ρ is one.

    Raises:
        ConfigError: it is not in [0, 0.5).
    """
    if not 0 <= length_control < 0.5:
        raise ConfigError(f"length_control: must be from 0 to below 0.5, found {length_control}")


def best(candidates: Iterable[Candidate]) -> Candidate | None:
    """The highest score, of several the one that is agreed on most, the shortest: for rejection sampling."""
    judged = _merged([candidate for candidate in candidates if candidate.ended and candidate.scores])
    return min(judged, key=lambda c: (-c.score, c.variance, c.length)) if judged else None


def _merged(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Answers with the same text as one, judged by all of their judgments."""
    by_text: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_text.setdefault(candidate.text.strip(), []).append(candidate)
    return [
        Candidate(
            key=same[0].key,
            text=same[0].text,
            length=same[0].length,
            scores=tuple(score for candidate in same for score in candidate.scores),
        )
        for same in by_text.values()
    ]
