"""Prompts, responses and messages of a row: parsed with `file:line` in every error, with all their keys.

A message has a role and a content. Others of its keys (`tool_calls`, `reasoning_content`, `name`) stay, and the chat
template gets them. A response is a string, a message, or several messages (a call, its result, an answer).
"""

from __future__ import annotations

import json
import re
from typing import Any

from aligner.common.errors import RowError
from aligner.data.rows import FORMS, Message, TextOrMessages, shorten

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
NOTHING = "whose answers all have weight 0"
"""Reason of a dropped row."""
RESULTS = ("tool", "function", "ipython")
"""Roles of what a tool returned."""
TEMPLATE_KEYS = ("tools", "chat_template_kwargs")
"""Keys of a row that the chat template gets beside the messages."""
SAID = ("content", "tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of what an assistant says; one of them must have a value."""


def text_of(row: dict[str, Any], key: str, source: str, *, response: bool = False) -> TextOrMessages:
    """Return the prompt or response under `key`.

    Raises:
        RowError: the key is missing, or its value is empty or of another form.
    """
    if key not in row:
        raise RowError(
            f"{source}: has no {key!r}; expected {FORMS}; found the keys {', '.join(map(repr, row)) or 'none'}"
        )
    return parse_text(row[key], key, source, response=response)


def parse_text(value: Any, key: str, source: str, *, response: bool = False) -> TextOrMessages:
    """Return a prompt or response; `key` is its name in messages.

    Raises:
        RowError: it is empty or of another form.
    """
    value = from_text(value)
    if isinstance(value, str):
        check_encodable(value, f"{source}: {key!r}")
        if not value.strip():
            raise RowError(f"{source}: {key!r} is empty; drop the row or fill it in", fault="empty")
        return value
    if isinstance(value, dict) and response:
        value = [value]
    messages = parse_messages(value, key, source)
    return check_response(messages, key, source) if response else messages


def from_text(value: Any) -> Any:
    """Return the messages that a string holds as JSON, as some tables do; any other value as it is."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if all(isinstance(item, dict) and "role" in item for item in found) else value


def parse_messages(value: Any, key: str, source: str) -> list[Message]:
    """Parse a list of messages.

    Raises:
        RowError: it is no list, empty, or holds what is no message.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, key, source)
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: {key!r} must be a string or a list of messages, found {shorten(value)}")
    return [_parse_message(item, f"{source}: {key}[{i}]") for i, item in enumerate(value)]


def check_response(messages: list[Message], key: str, source: str) -> list[Message]:
    """Return the messages of a response: the assistant's, with results of its calls between them.

    Raises:
        RowError: they are something else, or empty.
    """
    roles = [message["role"] for message in messages]
    if roles[0] != "assistant" or roles[-1] != "assistant" or not set(roles) <= {"assistant", *RESULTS}:
        raise RowError(
            f"{source}: {key!r} must be an assistant message, or several with the results of its calls between them; "
            f"found the roles {', '.join(roles)}"
        )
    for message in messages:
        if message["role"] == "assistant" and is_empty(message):
            raise RowError(f"{source}: {key!r} is empty; drop the row or fill it in", fault="empty")
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise RowError(f"{source}: {key!r} has weight 0, so there is nothing to learn; drop the row")
    return messages


def is_empty(message: Message) -> bool:
    """Return whether an assistant message says nothing."""
    return not any(value.strip() if isinstance(value := message.get(key), str) else value for key in SAID)


def answers(messages: list[Message]) -> list[int]:
    """Return the positions of a conversation's answers that are to be learned: all but those of weight 0."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0 and m.get("weight", 1)]


def template_arguments(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Return what a row gives to the chat template: `tools`, and `chat_template_kwargs`.

    Raises:
        RowError: a value is of another form.
    """
    arguments: dict[str, Any] = {}
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools", source)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RowError(f"{source}: 'tools' must be a list of objects, found {shorten(tools)}")
        arguments["tools"] = tools
    if more:
        if not isinstance(more, dict):
            raise RowError(f"{source}: 'chat_template_kwargs' must be an object, found {shorten(more)}")
        arguments |= more
    return arguments


def common_beginning(first: list[Message], second: list[Message]) -> int:
    """Return the number of messages with which two conversations begin alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def check_encodable(text: str, where: str) -> None:
    """Check that a text has no halves of characters.

    Raises:
        RowError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where}: holds half of a character ({text[error.start]!r}, as where an emoji was cut in two); drop it"
        ) from None


def _parse_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{where}: expected a message with 'role' and 'content' (strings), found {shorten(item)}")
    if item.get("role") not in ROLES:
        raise RowError(f"{where}: 'role' is {item.get('role')!r}, expected one of {', '.join(ROLES)}")
    # Tables fill in the keys of other messages with null.
    message = {key: value for key, value in item.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = message["content"] = _join(content, where)
    said = message["role"] == "assistant" and not is_empty(message)
    if not isinstance(content, str) and (content is not None or not said):
        raise RowError(f"{where}: expected a message with 'role' and 'content' (strings), found {shorten(item)}")
    if content is not None:
        check_encodable(content, where)
    else:
        message["content"] = None
    calls = message.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise RowError(f"{where}: 'tool_calls' must be a list, found {shorten(calls)}")
        message["tool_calls"] = [_parse_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]
    if "weight" in message and (message["role"] != "assistant" or message["weight"] not in (0, 1)):
        raise RowError(
            f"{where}: 'weight' is {message['weight']!r} in a message of {message['role']!r}; expected 0 or 1, in one "
            "of 'assistant'"
        )
    return message


def _join(parts: list[Any], where: str) -> str:
    """Return the text of a content in parts."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        kinds = ", ".join(str(part.get("type")) if isinstance(part, dict) else repr(part) for part in parts)
        raise RowError(f"{where}: 'content' has parts that are no text ({kinds}), and only text is trained on")
    return "".join(part["text"] for part in parts)


def _parse_call(call: Any, where: str) -> Any:
    """Return a call with its arguments as an object: templates write them as JSON, and servers parse them for that."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: expected a call with a function's name and arguments, found {shorten(call)}")
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        raise RowError(f"{where}: 'arguments' is not JSON: {shorten(function['arguments'])}") from None
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed


def _from_json(value: str, key: str, source: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{source}: {key!r} is a string that is not JSON ({error}): {shorten(value)}") from None
