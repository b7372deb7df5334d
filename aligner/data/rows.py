"""Rows in JSON: parsing and validation with `file:line` in every error.

A line is an object of one of three forms. A file contains one form. Other keys (category, id) are ignored:

    prompt, chosen_response, rejected_response; optional: chosen_reward and rejected_reward     a pair
    prompt, response; optional: preference ("chosen" or "rejected", or true or false)           a single response
    messages                                                                                    a conversation

A prompt or response is a string or OpenAI-style messages (`[{"role": "user", "content": "..."}]`); a response may also
be a single message. A conversation yields one single response per assistant message; its prompt is all earlier
messages. `aligner.data.sources` finds the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from aligner.common.errors import RowError

Message = dict[str, str]
TextOrMessages = str | list[Message]

ROLES = ("system", "user", "assistant", "tool")


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


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """A single response, optionally labeled desirable or undesirable."""

    source: str
    prompt: TextOrMessages
    response: TextOrMessages
    desirable: bool | None = None


Row = PreferenceRow | ResponseRow

LARGEST_REWARD = 1e30
"""Bound that keeps the difference of two rewards finite in float32."""

FORMS = "the keys prompt, chosen_response and rejected_response; or prompt and response; or messages"


@dataclass
class FormatCounts:
    """Counts of pairs and single responses in a file; counts of chunks can be merged."""

    pairs: int = 0
    singles: int = 0
    first_pair: str = ""
    first_single: str = ""
    lacking: dict[str, list[str]] = field(default_factory=dict)
    """Missing keys -> line numbers, at most `SHOWN`."""
    without: dict[str, int] = field(default_factory=dict)
    """Missing keys -> number of rows."""

    SHOWN: ClassVar[int] = 10

    def add(self, row: Row) -> None:
        if isinstance(row, PreferenceRow):
            self.pairs += 1
            self.first_pair = self.first_pair or row.source
            missing = "chosen_reward and rejected_reward" if row.chosen_reward is None else ""
        else:
            self.singles += 1
            self.first_single = self.first_single or row.source
            missing = "preference" if row.desirable is None else ""
        if missing:
            self.without[missing] = self.without.get(missing, 0) + 1
            lines, line = self.lacking.setdefault(missing, []), row.source.rpartition(":")[2]
            if len(lines) < self.SHOWN and line not in lines:
                lines.append(line)

    def merge(self, other: FormatCounts) -> None:
        """Add the counts of a later chunk."""
        self.pairs, self.singles = self.pairs + other.pairs, self.singles + other.singles
        self.first_pair = self.first_pair or other.first_pair
        self.first_single = self.first_single or other.first_single
        for name, count in other.without.items():
            self.without[name] = self.without.get(name, 0) + count
            self.lacking[name] = [*self.lacking.get(name, []), *other.lacking[name]][: self.SHOWN]

    def check(self, path: str | Path) -> None:
        """Check that rows have one form and the same optional keys; a default for missing ones would be silent.

        Raises:
            RowError: there are no rows, forms are mixed, or some rows lack a key that others have.
        """
        rows = self.pairs + self.singles
        if not rows:
            raise RowError(f"{path}: holds no rows; expected one a line, with {FORMS}")
        if self.pairs and self.singles:
            raise RowError(
                f"{self.first_pair} holds a pair and {self.first_single} a single response; put them into two files"
            )
        for name, count in self.without.items():
            if count < rows:
                shown = ", ".join(self.lacking[name]) + (", ..." if count > len(self.lacking[name]) else "")
                raise RowError(
                    f"{path}: {count} of {rows} rows have no {name} (lines {shown}), the others have; "
                    "give it in every row or in none"
                )


def parse_line(line: str, source: str) -> list[Row]:
    """Parse one line into rows; `source` is the prefix of error messages."""
    row = load_json(line, source)
    if "chosen_response" in row or "rejected_response" in row:
        return [_parse_pair(row, source)]
    for name in ("chosen_reward", "rejected_reward"):
        if row.get(name) is not None:
            raise RowError(f"{source}: has {name!r}, but no 'chosen_response' and 'rejected_response' that it is of")
    if "response" in row:
        prompt, response = text_of(row, "prompt", source), text_of(row, "response", source, response=True)
        return [ResponseRow(source, prompt, response, _parse_preference(row, source))]
    if "messages" in row:
        if row.get("preference") is not None:
            raise RowError(
                f"{source}: has 'preference' beside 'messages', which may hold several answers; write it as prompt "
                "(the messages before), response (the last one) and preference"
            )
        return _parse_conversation(row["messages"], source)
    return [_parse_pair(row, source)]


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
            f"{source}: is not JSON ({error}){why}; expected one object a line, found {_shorten(line)}"
        ) from None
    except ValueError as error:  # an integer with thousands of digits
        raise RowError(f"{source}: holds what cannot be read ({str(error)[:80]}), in {_shorten(line)}") from None
    except RecursionError:
        raise RowError(
            f"{source}: is nested too deeply to be read; expected one object a line, found {_shorten(line)}"
        ) from None
    if not isinstance(value, dict):
        raise RowError(f"{source}: expected a JSON object, found {_shorten(value)}")
    return value


def _parse_pair(values: dict[str, Any], source: str) -> PreferenceRow:
    row = PreferenceRow(
        source=source,
        prompt=text_of(values, "prompt", source),
        chosen_response=text_of(values, "chosen_response", source, response=True),
        rejected_response=text_of(values, "rejected_response", source, response=True),
        chosen_reward=_parse_reward(values, "chosen_reward", source),
        rejected_reward=_parse_reward(values, "rejected_reward", source),
    )
    if row.chosen_response == row.rejected_response:
        raise RowError(
            f"{source}: chosen_response equals rejected_response ({_shorten(row.chosen_response)}); a pair needs two "
            "different answers: drop the row",
            fault="same-answers",
        )
    if (row.chosen_reward is None) != (row.rejected_reward is None):
        raise RowError(
            f"{source}: only one of chosen_reward and rejected_reward is given; give both or neither", fault="rewards"
        )
    return row


def _parse_conversation(value: Any, source: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: 'messages' must be a list of messages, found {_shorten(value)}")
    messages = [_parse_message(item, f"{source}: messages[{i}]") for i, item in enumerate(value)]
    rows: list[Row] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            if not message["content"].strip():
                raise RowError(f"{source}: messages[{i}] is an empty answer; drop the row or fill it in", fault="empty")
            rows.append(ResponseRow(source, messages[:i], [message]))
    if not rows:
        raise RowError(f"{source}: 'messages' has no assistant message after another, so there is nothing to learn")
    return rows


def _parse_preference(row: dict[str, Any], source: str) -> bool | None:
    value = row.get("preference")
    labels = {"chosen": True, "rejected": False}
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str) or value not in labels:
        raise RowError(
            f"{source}: 'preference' must be 'chosen' or 'rejected' (or true or false), found {_shorten(value)}"
        )
    return labels[value]


def text_of(row: dict[str, Any], key: str, source: str, *, response: bool = False) -> TextOrMessages:
    """Return the prompt or response under `key`.

    Raises:
        RowError: the key is missing, or its value is empty or of another form.
    """
    if key not in row:
        raise RowError(
            f"{source}: has no {key!r}; expected {FORMS}; found the keys {', '.join(map(repr, row)) or 'none'}"
        )
    value = row[key]
    if isinstance(value, str):
        _check_encodable(value, f"{source}: {key!r}")
        if not value.strip():
            raise RowError(f"{source}: {key!r} is empty; drop the row or fill it in", fault="empty")
        return value
    if isinstance(value, dict) and response:
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: {key!r} must be a string or a list of messages, found {_shorten(value)}")
    messages = [_parse_message(item, f"{source}: {key}[{i}]") for i, item in enumerate(value)]
    if response and (len(messages) != 1 or messages[0]["role"] != "assistant"):
        raise RowError(f"{source}: {key!r} must be one assistant message, found {_shorten(value)}")
    if response and not messages[0]["content"].strip():
        raise RowError(f"{source}: {key!r} is empty; drop the row or fill it in", fault="empty")
    return messages


def _parse_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise RowError(f"{where}: expected a message with 'role' and 'content' (strings), found {_shorten(item)}")
    if item.get("role") not in ROLES:
        raise RowError(f"{where}: 'role' is {item.get('role')!r}, expected one of {', '.join(ROLES)}")
    _check_encodable(item["content"], where)
    return {"role": item["role"], "content": item["content"]}


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where}: holds half of a character ({text[error.start]!r}, as where an emoji was cut in two); drop it"
        ) from None


def _parse_reward(row: dict[str, Any], key: str, source: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_REWARD:
        raise RowError(
            f"{source}: {key!r} must be a finite number (below 1e30 in size), found {_shorten(value)}", fault="rewards"
        )
    return float(value)


def _shorten(value: Any, length: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
