"""Rows: what a line of a file says, whatever its form. `aligner.data.forms` reads them.

A prompt or response is a string or a list of messages (`aligner.data.forms.messages`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from aligner.common.errors import RowError

Message = dict[str, Any]
"""A message with the keys that it has in the data: role, content, tool_calls, reasoning_content and others."""
TextOrMessages = str | list[Message]


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A pair: prompt, chosen and rejected response."""

    source: str
    """`file:line`, for error messages."""
    prompt: TextOrMessages
    chosen_response: TextOrMessages
    rejected_response: TextOrMessages
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    template: dict[str, Any] = field(default_factory=dict)
    """What the chat template gets beside the messages: `tools`, and the row's `chat_template_kwargs`."""


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """A single response, optionally labeled desirable or undesirable."""

    source: str
    prompt: TextOrMessages
    response: TextOrMessages
    desirable: bool | None = None
    template: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row of which its form makes none, as a tie; it is counted."""

    source: str
    reason: str


Row = PreferenceRow | ResponseRow

LARGEST_REWARD = 1e30
"""Bound that keeps the difference of two rewards finite in float32."""

FORMS = "the keys prompt, chosen and rejected; or prompt and response; or messages; or those of `nemo llm forms`"


@dataclass
class FormatCounts:
    """Counts of the rows of a file; counts of chunks can be merged."""

    pairs: int = 0
    singles: int = 0
    lacking: dict[str, list[str]] = field(default_factory=dict)
    """Missing keys -> line numbers, at most `SHOWN`."""
    without: dict[str, int] = field(default_factory=dict)
    """Missing keys -> number of rows."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rows that a form makes no row of."""
    dropped_at: list[str] = field(default_factory=list)
    """Sources of these, at most `SHOWN`."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Key that is not read -> number of rows with it."""

    SHOWN: ClassVar[int] = 10

    def add(self, row: Row) -> None:
        if isinstance(row, PreferenceRow):
            self.pairs += 1
            missing = "chosen_reward and rejected_reward" if row.chosen_reward is None else ""
        else:
            self.singles += 1
            missing = "preference" if row.desirable is None else ""
        if missing:
            self.without[missing] = self.without.get(missing, 0) + 1
            lines, line = self.lacking.setdefault(missing, []), row.source.rpartition(":")[2]
            if len(lines) < self.SHOWN and line not in lines:
                lines.append(line)

    def drop(self, row: DroppedRow) -> None:
        """Count a row that is dropped."""
        self.dropped[row.reason] += 1
        if len(self.dropped_at) < self.SHOWN:
            self.dropped_at.append(row.source)

    def merge(self, other: FormatCounts) -> None:
        """Add the counts of a later chunk."""
        self.pairs, self.singles = self.pairs + other.pairs, self.singles + other.singles
        self.dropped.update(other.dropped)
        self.dropped_at = [*self.dropped_at, *other.dropped_at][: self.SHOWN]
        self.left_out.update(other.left_out)
        for name, count in other.without.items():
            self.without[name] = self.without.get(name, 0) + count
            self.lacking[name] = [*self.lacking.get(name, []), *other.lacking[name]][: self.SHOWN]

    def check(self, path: str | Path) -> None:
        """Check that rows have the same optional keys; a default for missing ones would be silent.

        Raises:
            RowError: there are no rows, or some rows lack a key that others have.
        """
        rows = self.pairs + self.singles
        if not rows and self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            raise RowError(f"{path}: every row is dropped ({reasons})")
        if not rows:
            raise RowError(f"{path}: holds no rows; expected one a line, with {FORMS}")
        for name, count in self.without.items():
            if count < rows:
                shown = ", ".join(self.lacking[name]) + (", ..." if count > len(self.lacking[name]) else "")
                raise RowError(
                    f"{path}: {count} of {rows} rows have no {name} (lines {shown}), the others have; "
                    "give it in every row or in none"
                )


def load_json(line: str, source: str) -> dict[str, Any]:
    """Parse a line as a JSON object.

    Raises:
        RowError: the line is not JSON or not an object.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        truncated = error.msg.startswith("Unterminated") or error.pos >= len(line.rstrip())
        why = "; the line breaks off, as in a file that was cut while it was written or copied" if truncated else ""
        raise RowError(
            f"{source}: is not JSON ({error}){why}; expected one object a line, found {shorten(line)}"
        ) from None
    except ValueError as error:  # an integer with thousands of digits
        raise RowError(f"{source}: holds what cannot be read ({str(error)[:80]}), in {shorten(line)}") from None
    except RecursionError:
        raise RowError(
            f"{source}: is nested too deeply to be read; expected one object a line, found {shorten(line)}"
        ) from None
    if not isinstance(value, dict):
        raise RowError(f"{source}: expected a JSON object, found {shorten(value)}")
    return value


def shorten(value: Any, length: int = 60) -> str:
    """Return a value as it is shown in an error."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
