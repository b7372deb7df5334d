"""Selection of the chosen and the rejected response of a prompt.

Self-rewarding (Yuan et al. 2024, arXiv 2401.10020, section 2.2) takes the highest and the lowest score. Meta-rewarding
(Wu et al. 2024, arXiv 2407.19594, section 2.2) takes the shortest response with a high score and the longest response
with a low score.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aligner.common.errors import ConfigError

Reason = Literal["unended", "unparsed", "identical", "tied"]
"""Why a prompt gives no pair: fewer than two complete responses; fewer than two of these with a score; all texts are
equal; all scores are equal."""

ROUNDING = 1e-6
"""Mean scores within this distance count as equal."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A response to a prompt, with its scores."""

    key: str
    text: str
    length: int
    """Length in tokens."""
    ended: bool = True
    """Whether the response is complete."""
    scores: tuple[float, ...] = field(default=())
    """Scores of the parsed judgments."""

    @property
    def score(self) -> float:
        """Mean of the scores."""
        return statistics.fmean(self.scores)

    @property
    def variance(self) -> float:
        """Population variance of the scores."""
        return statistics.pvariance(self.scores)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A pair, or the reason why there is no pair."""

    chosen: Candidate | None = None
    rejected: Candidate | None = None
    reason: Reason | None = None


def select(candidates: Iterable[Candidate], *, length_control: float = 0.0) -> Selection:
    """Select the chosen and the rejected response of a prompt.

    Let ρ = `length_control`, and S⁺ and S⁻ the highest and the lowest mean score. Chosen is the shortest response with
    a score of at least (1-ρ)S⁺ + ρS⁻; rejected is the longest with a score of at most (1-ρ)S⁻ + ρS⁺. With ρ = 0 these
    are the best and the worst response; ties go to the lowest variance of scores. Responses that are incomplete or
    have no score are ignored. Responses with the same text are merged, with the scores of all.

    Raises:
        ConfigError: ρ is outside [0, 0.5); from 0.5 a response could be both chosen and rejected.
    """
    check_control(length_control)
    ended = [candidate for candidate in candidates if candidate.ended]
    judged = [candidate for candidate in ended if candidate.scores]
    for usable, reason in ((ended, "unended"), (judged, "unparsed")):
        if len(usable) < 2:
            return Selection(reason=reason)  # type: ignore[arg-type]
    distinct = _merged(judged)
    if len(distinct) < 2:
        return Selection(reason="identical")
    high, low = (pick(candidate.score for candidate in distinct) for pick in (max, min))
    if high - low <= ROUNDING:
        return Selection(reason="tied")
    slack = length_control * (high - low)
    # The bounds are inclusive, whatever the rounding of a mean.
    good = [candidate for candidate in distinct if candidate.score >= high - slack - ROUNDING / 4]
    bad = [candidate for candidate in distinct if candidate.score <= low + slack + ROUNDING / 4]
    if length_control:
        chosen = min(good, key=lambda c: (c.length, -c.score, c.variance))
        rejected = min(bad, key=lambda c: (-c.length, c.score, c.variance))
    else:
        chosen, rejected = (min(tied, key=lambda c: c.variance) for tied in (good, bad))
    return Selection(chosen=chosen, rejected=rejected)


def check_control(length_control: float) -> None:
    """Check ρ.

    Raises:
        ConfigError: ρ is outside [0, 0.5).
    """
    if not 0 <= length_control < 0.5:
        raise ConfigError(f"length_control: must be from 0 to below 0.5, found {length_control}")


def best(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the response with the highest score, for rejection sampling; ties: lowest variance, then shortest."""
    judged = _merged([candidate for candidate in candidates if candidate.ended and candidate.scores])
    return min(judged, key=lambda c: (-c.score, c.variance, c.length)) if judged else None


def _merged(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Merge responses with the same text; the result has the scores of all."""
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
