"""What a line holds: rows in JSON, and refusals that name file and line.

A line is an object of one of three forms, the same in the whole file; other keys (a category, an id) are left alone:

    prompt, chosen_response, rejected_response; optional: chosen_reward and rejected_reward     a pair
    prompt, response; optional: preference ("chosen" or "rejected", or true or false)           a single response
    messages                                                                                    a conversation

A prompt or response is a string, or OpenAI-style messages (`[{"role": "user", "content": "..."}]`; a response may be
the one message itself). A conversation makes one single response of each of its assistant messages, with all that
stands before as the prompt. Which files hold lines is the matter of `aligner.data.sources`.
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
    """One human (or machine) judgment: this answer rather than that one."""

    source: str
    """`file:line`, for messages."""
    prompt: TextOrMessages
    chosen_response: TextOrMessages
    rejected_response: TextOrMessages
    chosen_reward: float | None = None
    rejected_reward: float | None = None


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """One answer, and perhaps whether it is wanted."""

    source: str
    prompt: TextOrMessages
    response: TextOrMessages
    desirable: bool | None = None


Row = PreferenceRow | ResponseRow

LARGEST_REWARD = 1e30
"""So that the difference of two is a number in float32, too."""

FORMS = "the keys prompt, chosen_response and rejected_response; or prompt and response; or messages"


@dataclass
class FormatCounts:
    """Which kinds of rows a file holds; chunks of it can be counted apart and added up."""

    pairs: int = 0
    singles: int = 0
    first_pair: str = ""
    first_single: str = ""
    lacking: dict[str, list[str]] = field(default_factory=dict)
    """What some rows do without -> where, up to `SHOWN` lines."""
    without: dict[str, int] = field(default_factory=dict)
    """The same -> how many rows."""

    SHOWN: ClassVar[int] = 10

    def add(self, row: Row) -> None:
        if isinstance(row, PreferenceRow):
            self.pairs += 1
            self.first_pair = self.first_pair or row.source
            lacks = "chosen_reward and rejected_reward" if row.chosen_reward is None else ""
        else:
            self.singles += 1
            self.first_single = self.first_single or row.source
            lacks = "preference" if row.desirable is None else ""
        if lacks:
            self.without[lacks] = self.without.get(lacks, 0) + 1
            lines, line = self.lacking.setdefault(lacks, []), row.source.rpartition(":")[2]
            if len(lines) < self.SHOWN and line not in lines:
                lines.append(line)

    def merge(self, other: FormatCounts) -> None:
        """Add what comes later in the file."""
        self.pairs, self.singles = self.pairs + other.pairs, self.singles + other.singles
        self.first_pair = self.first_pair or other.first_pair
        self.first_single = self.first_single or other.first_single
        for name, count in other.without.items():
            self.without[name] = self.without.get(name, 0) + count
            self.lacking[name] = [*self.lacking.get(name, []), *other.lacking[name]][: self.SHOWN]

    def check(self, path: str | Path) -> None:
        """What some rows have, all must have: a default for the others would be a silent one.

        Raises:
            RowError: there are no rows, or they do not go together.
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
    """One line of a file as its rows; `source` is what error messages begin with."""
    found = loaded(line, source)
    if "chosen_response" in found or "rejected_response" in found:
        return [_pair(found, source)]
    for name in ("chosen_reward", "rejected_reward"):
        if found.get(name) is not None:
            raise RowError(f"{source}: has {name!r}, but no 'chosen_response' and 'rejected_response' that it is of")
    if "response" in found:
        prompt, response = text_of(found, "prompt", source), text_of(found, "response", source, response=True)
        return [ResponseRow(source, prompt, response, _preference(found, source))]
    if "messages" in found:
        if found.get("preference") is not None:
            raise RowError(
                f"{source}: has 'preference' beside 'messages', which may hold several answers; write it as prompt "
                "(the messages before), response (the last one) and preference"
            )
        return _conversation(found["messages"], source)
    return [_pair(found, source)]


def loaded(line: str, source: str) -> dict[str, Any]:
    """A line as the JSON object that it is.

    Raises:
        RowError: it is none.
    """
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        torn = error.msg.startswith("Unterminated") or error.pos >= len(line.rstrip())
        why = "; the line breaks off, as in a file that was cut while it was written or copied" if torn else ""
        raise RowError(
            f"{source}: is not JSON ({error}){why}; expected one object a line, found {_cut(line)}"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise RowError(f"{source}: holds what cannot be read ({str(error)[:80]}), in {_cut(line)}") from None
    except RecursionError:
        raise RowError(
            f"{source}: is nested too deeply to be read; expected one object a line, found {_cut(line)}"
        ) from None
    if not isinstance(found, dict):
        raise RowError(f"{source}: expected a JSON object, found {_cut(found)}")
    return found


def _pair(found: dict[str, Any], source: str) -> PreferenceRow:
    row = PreferenceRow(
        source=source,
        prompt=text_of(found, "prompt", source),
        chosen_response=text_of(found, "chosen_response", source, response=True),
        rejected_response=text_of(found, "rejected_response", source, response=True),
        chosen_reward=_reward(found, "chosen_reward", source),
        rejected_reward=_reward(found, "rejected_reward", source),
    )
    if row.chosen_response == row.rejected_response:
        raise RowError(
            f"{source}: chosen_response equals rejected_response ({_cut(row.chosen_response)}); a pair needs two "
            "different answers: drop the row",
            fault="same-answers",
        )
    if (row.chosen_reward is None) != (row.rejected_reward is None):
        raise RowError(
            f"{source}: only one of chosen_reward and rejected_reward is given; give both or neither", fault="rewards"
        )
    return row


def _conversation(value: Any, source: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: 'messages' must be a list of messages, found {_cut(value)}")
    messages = [_message(item, f"{source}: messages[{i}]") for i, item in enumerate(value)]
    rows: list[Row] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            if not message["content"].strip():
                raise RowError(f"{source}: messages[{i}] is an empty answer; drop the row or fill it in", fault="empty")
            rows.append(ResponseRow(source, messages[:i], [message]))
    if not rows:
        raise RowError(f"{source}: 'messages' has no assistant message after another, so there is nothing to learn")
    return rows


def _preference(found: dict[str, Any], source: str) -> bool | None:
    value = found.get("preference")
    known = {"chosen": True, "rejected": False}
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str) or value not in known:
        raise RowError(f"{source}: 'preference' must be 'chosen' or 'rejected' (or true or false), found {_cut(value)}")
    return known[value]


def text_of(row: dict[str, Any], key: str, source: str, *, response: bool = False) -> TextOrMessages:
    """The prompt or response that a row has under `key`.

    Raises:
        RowError: it is none.
    """
    if key not in row:
        raise RowError(
            f"{source}: has no {key!r}; expected {FORMS}; found the keys {', '.join(map(repr, row)) or 'none'}"
        )
    value = row[key]
    if isinstance(value, str):
        _writable(value, f"{source}: {key!r}")
        if not value.strip():
            raise RowError(f"{source}: {key!r} is empty; drop the row or fill it in", fault="empty")
        return value
    if isinstance(value, dict) and response:
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: {key!r} must be a string or a list of messages, found {_cut(value)}")
    messages = [_message(item, f"{source}: {key}[{i}]") for i, item in enumerate(value)]
    if response and (len(messages) != 1 or messages[0]["role"] != "assistant"):
        raise RowError(f"{source}: {key!r} must be one assistant message, found {_cut(value)}")
    if response and not messages[0]["content"].strip():
        raise RowError(f"{source}: {key!r} is empty; drop the row or fill it in", fault="empty")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise RowError(f"{where}: expected a message with 'role' and 'content' (strings), found {_cut(item)}")
    if item.get("role") not in ROLES:
        raise RowError(f"{where}: 'role' is {item.get('role')!r}, expected one of {', '.join(ROLES)}")
    _writable(item["content"], where)
    return {"role": item["role"], "content": item["content"]}


def _writable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where}: holds half of a character ({text[error.start]!r}, as where an emoji was cut in two); drop it"
        ) from None


def _reward(row: dict[str, Any], key: str, source: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_REWARD:
        raise RowError(
            f"{source}: {key!r} must be a finite number (below 1e30 in size), found {_cut(value)}", fault="rewards"
        )
    return float(value)


def _cut(value: Any, length: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
