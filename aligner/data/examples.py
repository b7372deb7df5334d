"""Training examples from rows: the tokens of one prompt and of its responses.

The kind of objective selects the responses of a row:

    pairs            two responses, chosen and rejected      one example per pair
    unpaired         one desirable or undesirable response   two examples per pair
    demonstrations   one response to imitate                 one example per pair, its chosen response
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from aligner.common.errors import ConfigError, RowError
from aligner.data.rows import PreferenceRow, ResponseRow, Row, TextOrMessages
from aligner.data.tokenization import ResponseTokenizer

Kind = Literal["pairs", "unpaired", "demonstrations"]
Overlong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of its responses: chosen and rejected, or a single response."""

    source: str
    prompt: list[int]
    responses: tuple[list[int], ...]
    rewards: tuple[float, float] = (1.0, 0.0)
    """Chosen and rejected rewards from the data."""
    desirable: bool = True
    unscored: tuple[list[int], ...] = ()
    """Positions in each response that are context: results of tools. Empty: every token is scored."""

    @property
    def length(self) -> int:
        """Tokens of the longest sequence (prompt and one response)."""
        return len(self.prompt) + max(map(len, self.responses))


@dataclass
class TokenizationStats:
    """Tokenization counts of one or several files."""

    kind: Kind
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    """Tokens of all sequences of the kept examples; a shared prompt counts once per sequence."""
    with_rewards: bool = False
    merged_at_border: int = 0
    """Responses whose first characters would have merged into the prompt's last token."""
    undesirable: int = 0
    """Kept examples whose response is not wanted."""
    unwanted: int = 0
    """Rejected responses skipped by an objective that uses only desirable ones."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of examples."""
    truncated: int = 0
    left: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rows that hold no example, as ties."""

    @property
    def found(self) -> int:
        """Number of examples before dropping."""
        return self.kept + self.dropped.total()

    def merge(self, other: TokenizationStats) -> None:
        """Add the counts of other rows."""
        for name in ("rows", "kept", "tokens", "merged_at_border", "undesirable", "unwanted", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        self.left.update(other.left)
        self.with_rewards |= other.with_rewards

    def one_sided(self) -> str | None:
        """Describe responses of which nearly all have the same preference; None if both sides are there."""
        fewer = min(self.undesirable, self.kept - self.undesirable)
        if self.kind != "unpaired" or not self.kept or fewer >= 0.1 * self.kept:
            return None
        side = "undesirable" if self.undesirable == fewer else "desirable"
        said = f"{self.kept - self.undesirable} chosen and {self.undesirable} rejected responses"
        if not fewer:
            return f"{said}: one side alone teaches no difference; add responses of the other"
        return f"{said}: loss.{side}_weight={(self.kept - fewer) / fewer:.3g} gives both sides the same weight"

    def add_dropped_rows(self, dropped: Counter[str]) -> None:
        """Count rows of which their form made no example."""
        self.rows += dropped.total()
        self.left += dropped

    def __str__(self) -> str:
        noun = {"pairs": "pairs", "unpaired": "responses", "demonstrations": "responses"}[self.kind]
        parts = [f"{self.kept} of {self.found} {noun}, {self.tokens} tokens"]
        parts += [f"{count} dropped: {reason}" for reason, count in self.dropped.items()]
        parts += [f"{count} rows left out: {reason}" for reason, count in self.left.items()]
        if self.unwanted:
            parts.append(f"{self.unwanted} rejected responses left out")
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.merged_at_border:
            parts.append(f"{self.merged_at_border} responses start inside a token of the prompt's text")
        return "; ".join(parts)


def examples(
    rows: Iterable[Row], encode: ResponseTokenizer, *, kind: Kind, seq_length: int, overlong: Overlong = "drop"
) -> tuple[list[Example], TokenizationStats]:
    """Return the examples of rows, at most `seq_length` tokens a sequence, and their statistics.

    Treatment of a longer example by `overlong`: "drop" skips and counts it; "truncate" cuts its responses (a truncated
    response has no end-of-turn token; a prompt that alone fills `seq_length` is dropped); "error" raises.

    Raises:
        RowError: a row lacks a field that `kind` requires, cannot be tokenized, or is too long under "error".
    """
    report, accepted, merged = TokenizationStats(kind), [], encode.merged
    for row in rows:
        report.rows += 1
        report.with_rewards |= isinstance(row, PreferenceRow) and row.chosen_reward is not None
        for responses, desirable in _row_responses(row, kind, report):
            prompt, found = encode.tokens(row.source, row.prompt, responses, row.template)
            tokens = tuple(response.ids for response in found)
            unscored = tuple(response.unscored for response in found)
            rewards = (1.0, 0.0)
            if isinstance(row, PreferenceRow) and row.chosen_reward is not None and row.rejected_reward is not None:
                rewards = (row.chosen_reward, row.rejected_reward)
            example = Example(row.source, prompt, tokens, rewards, desirable, unscored if any(unscored) else ())
            example = _shorten(example, seq_length, overlong, report)
            if example is None:
                continue
            if kind == "pairs" and example.responses[0] == example.responses[1]:
                report.dropped["both answers have the same tokens"] += 1
                continue
            accepted.append(example)
    report.kept = len(accepted)
    report.undesirable = sum(not example.desirable for example in accepted)
    report.tokens = sum(len(e.prompt) + len(response) for e in accepted for response in e.responses)
    report.merged_at_border = encode.merged - merged
    return accepted, report


def _row_responses(row: Row, kind: Kind, report: TokenizationStats) -> list[tuple[list[TextOrMessages], bool]]:
    """Return the responses of each example of a row, and whether they are desirable."""
    if isinstance(row, PreferenceRow):
        return {
            "pairs": [([row.chosen_response, row.rejected_response], True)],
            "unpaired": [([row.chosen_response], True), ([row.rejected_response], False)],
            "demonstrations": [([row.chosen_response], True)],
        }[kind]
    assert isinstance(row, ResponseRow)
    if kind == "pairs":
        raise RowError(
            f"{row.source}: holds one response, but the loss compares two; expected the keys prompt, chosen_response "
            "and rejected_response (or train with loss=kto, or on demonstrations with preference_loss_weight=0)"
        )
    if kind == "unpaired" and row.desirable is None:
        raise RowError(f"{row.source}: has no 'preference'; expected 'chosen' or 'rejected', which the loss learns")
    if kind == "demonstrations" and row.desirable is False:
        report.unwanted += 1
        return []
    return [([row.response], row.desirable is not False)]


def _shorten(example: Example, seq_length: int, overlong: Overlong, report: TokenizationStats) -> Example | None:
    if example.length <= seq_length:
        return example
    if overlong == "error":
        raise RowError(
            f"{example.source}: has {example.length} tokens, more than data.seq_length={seq_length}; raise it, drop "
            "the row, or set data.overlong to 'drop' or 'truncate'"
        )
    room = seq_length - len(example.prompt)
    if overlong == "drop" or room < 1:
        report.dropped[f"longer than seq_length={seq_length}"] += 1
        return None
    report.truncated += 1
    cut = replace(example, responses=tuple(response[:room] for response in example.responses))
    return replace(cut, unscored=tuple([i for i in positions if i < room] for positions in example.unscored))


def check_share(report: TokenizationStats, path: str, *, seq_length: int, limit: float) -> None:
    """Check the fraction of dropped examples.

    Raises:
        ConfigError: all examples were dropped, or more than the fraction `limit`.
    """
    dropped = report.dropped.total()
    if report.kept and dropped <= limit * report.found:
        return
    if not report.found:
        raise ConfigError(f"{path}: all {report.rows} rows are rejected responses; there is none to learn from")
    reasons = "; ".join(f"{count} {reason}" for reason, count in report.dropped.items())
    raise ConfigError(
        f"data.max_dropped_fraction: {dropped} of {report.found} examples of {path} would be dropped ({reasons}), more "
        f"than {limit:.0%}; raise data.seq_length={seq_length}, clean the data, or allow a larger share"
    )
