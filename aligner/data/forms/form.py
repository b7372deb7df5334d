"""What a form is, and what the functions that read one share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from aligner.common.errors import RowError
from aligner.data.forms.messages import (
    TEMPLATE_KEYS,
    check_response,
    common_beginning,
    from_text,
    is_empty,
    parse_messages,
    parse_text,
    template_arguments,
)
from aligner.data.rows import DroppedRow, Message, PreferenceRow, Row, TextOrMessages, shorten

RankedPairs = Literal["best_worst", "neighbours", "all"]
"""Pairs of a ranked list: the best against the worst, each against the next, or every two of unequal rank."""
Values = dict[str, Any]
Found = list[Row | DroppedRow]

LARGEST_REWARD = 1e30
"""Bound that keeps the difference of two rewards finite in float32."""


@dataclass(frozen=True)
class Options:
    """Settings of the forms."""

    ranked_pairs: RankedPairs = "best_worst"
    ignore_columns: tuple[str, ...] = ()
    """Columns to leave out though they judge or say something."""


@dataclass(frozen=True)
class Form:
    """A form of rows."""

    name: str
    known_from: str
    needs: frozenset[str]
    """Keys of every row, by which it is recognized."""
    read: Callable[[Values, str, Options], Found]
    example: Values | list[Values]
    """A row, or several that are read together."""
    reads: frozenset[str] = frozenset()
    """Keys that are used where a row has them."""
    repeats: frozenset[str] = frozenset()
    """Keys that say once more what another says."""
    fits: Callable[[Values], bool] = field(default=lambda row: True)
    """Whether the values are of this form, beyond the names of the keys."""
    together: str | None = None
    """Key by which consecutive rows belong together; `read` then gets their list under `rows`."""

    @property
    def known(self) -> frozenset[str]:
        return self.needs | self.reads | self.repeats | set(TEMPLATE_KEYS)


def number(row: Values, key: str, source: str) -> float | None:
    """Return a finite number, or None if there is none.

    Raises:
        RowError: the value is something else.
    """
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value):
        value = float(value)  # of a table in CSV
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_REWARD:
        raise RowError(
            f"{source}: {key!r} must be a finite number (below 1e30 in size), found {shorten(value)}", fault="rewards"
        )
    return float(value)


def truth(row: Values, key: str, source: str) -> bool:
    """Return a truth value.

    Raises:
        RowError: the value is something else.
    """
    value = row[key]
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        return value.lower() in ("true", "1")  # of a table in CSV
    if not isinstance(value, bool) and value not in (0, 1):
        raise RowError(f"{source}: {key!r} must be true or false, found {shorten(value)}")
    return bool(value)


def rewards(row: Values, names: tuple[tuple[str, str], ...], source: str) -> tuple[float | None, float | None]:
    """Return the rewards of the chosen and the rejected response, under the first names of which a row has one.

    Raises:
        RowError: only one of the two is given, or one is no number.
    """
    for chosen, rejected in names:
        found = number(row, chosen, source), number(row, rejected, source)
        if (found[0] is None) != (found[1] is None):
            raise RowError(
                f"{source}: only one of {chosen} and {rejected} is given; give both or neither", fault="rewards"
            )
        if found[0] is not None:
            return found
    return None, None


def pair(
    source: str,
    prompt: TextOrMessages,
    chosen: TextOrMessages,
    rejected: TextOrMessages,
    row: Values,
    rated: tuple[float | None, float | None] = (None, None),
) -> Found:
    """Return a pair; equal or empty answers, of which public data has some, are dropped."""
    if any(_says_nothing(answer) for answer in (chosen, rejected)):
        return [DroppedRow(source, "with an empty answer")]
    if chosen == rejected:
        return [DroppedRow(source, "with two equal answers")]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowError(f"{source}: one response is a string and one a message; write both the same way")
    for answer in (chosen, rejected):
        if isinstance(answer, list):
            check_response(answer, "response", source)
    return [PreferenceRow(source, prompt, chosen, rejected, rated[0], rated[1], template_arguments(row, source))]


def conversations(source: str, chosen: list[Message], rejected: list[Message], row: Values, **more: Any) -> Found:
    """Return the pair of two conversations: their common beginning is the prompt, the rest are the answers."""
    count = common_beginning(chosen, rejected)
    if chosen == rejected:
        return [DroppedRow(source, "with two equal answers")]
    if not count:
        raise RowError(f"{source}: the two conversations have no message in common, so there is no prompt")
    # An answer in several messages may begin with the same call; it ends the prompt then, with its result.
    first, second = chosen[count:], rejected[count:]
    if not first or not second:
        return [DroppedRow(source, "with an answer that the other one only begins with")]
    if any(message["role"] in ("user", "system") for message in [*first, *second]):
        return [DroppedRow(source, "with dialogues that differ before their last answer")]
    return pair(source, chosen[:count], first, second, row, **more)


def prompt_of(row: Values, key: str, source: str) -> TextOrMessages:
    """Return the prompt under `key`, after the row's `system` message if it has one."""
    prompt = parse_text(row[key], key, source)
    if not row.get("system"):
        return prompt
    system = parse_text(row["system"], "system", source)
    if not isinstance(system, str):
        raise RowError(f"{source}: 'system' must be a string, found {shorten(system)}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]


def answer_of(value: Any, key: str, source: str) -> TextOrMessages:
    """Return a response; unlike `parse_text`, an empty one is returned, too, for `pair` to drop."""
    value = from_text(value)
    if isinstance(value, str):
        return value if not value.strip() else parse_text(value, key, source)
    return parse_messages([value] if isinstance(value, dict) else value, key, source)


def ranked(
    source: str, prompt: TextOrMessages, answers: list[tuple[float, TextOrMessages]], row: Values, options: Options
) -> Found:
    """Return the pairs of answers with ranks, of which the lowest is best."""
    if any(not math.isfinite(rank) for rank, _ in answers):
        raise RowError(f"{source}: a rank is no number")
    answers = sorted(answers, key=lambda item: item[0])
    count = len(answers)
    if options.ranked_pairs == "best_worst":
        chosen = [(0, count - 1)] if count > 1 else []
    elif options.ranked_pairs == "neighbours":
        chosen = [(i, i + 1) for i in range(count - 1)]
    else:
        chosen = [(i, j) for i in range(count) for j in range(i + 1, count)]
    found: Found = []
    for best, worst in chosen:
        if answers[best][0] < answers[worst][0]:
            found += pair(source, prompt, answers[best][1], answers[worst][1], row)
    return found or [DroppedRow(source, "with a tie" if count > 1 else "with a single answer")]


def _says_nothing(answer: TextOrMessages) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return any(message["role"] == "assistant" and is_empty(message) for message in answer)
