"""Chat templates: messages to text, and where the response begins in it.

A template is a program of the model's makers. What a row holds and a template does not write is refused, never lost.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.nodes

from aligner.common.errors import ConfigError, RowError
from aligner.common.time_limit import time_limit
from aligner.data.rows import Message, TextOrMessages

TEMPLATE_S = 30.0
"""Seconds in which a template must have written a conversation."""
CLOCK = "strftime_now"
"""Function that transformers gives to templates; those that call it write the date of the day into every prompt."""
CARRIES = ("tool_calls", "reasoning_content", "thinking", "function_call", "tools", "documents")
"""Keys of messages, and of a row, whose content a template must write."""
THOUGHTS = ("reasoning_content", "thinking")
"""Keys of what an assistant thinks before it answers."""
MARK = "\ue000answer\ue000"
"""Stands for an answer, to find what a template writes around it."""
ESCAPED = json.dumps(MARK)[1:-1]
"""The same in JSON."""


@dataclass(frozen=True)
class TemplateSettings:
    """What a chat template depends on beside a row."""

    kwargs: Mapping[str, Any] | None = None
    """Arguments of every call, as {"enable_thinking": False}; a row's own take precedence."""
    date: str = ""
    """Day that `strftime_now` tells, as 2026-11-30; empty: today."""


PLAIN = TemplateSettings()


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text of a prompt and of the response after it."""

    prompt: str
    response: str
    templated: bool = False
    scored: tuple[tuple[int, int], ...] = ()
    """Begin and end of each part of the response that is scored, in characters; none: all of it."""


def uses_clock(hf: Any) -> bool:
    """Return whether a tokenizer's chat template writes the date of the day."""
    return any(CLOCK in source for source in _sources(hf))


def date_of(tokenizer: Any, date: str | None) -> str:
    """Return the day that a tokenizer's chat template is to write, today if none is given; empty if it writes none."""
    if not uses_clock(getattr(tokenizer, "tokenizer", tokenizer)):
        return ""
    return date or datetime.date.today().isoformat()


def check_date(date: str | None) -> None:
    """Check a setting `data.date`.

    Raises:
        ConfigError: it is no day.
    """
    try:
        datetime.date.fromisoformat(date or "2026-01-01")
    except ValueError:
        raise ConfigError(f"data.date: {date!r} is no day, as 2026-11-30") from None


def _sources(hf: Any) -> list[str]:
    template = hf.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


def _names(sources: Sequence[str]) -> frozenset[str]:
    """Return all names and strings of templates: a key that is not among them is not written."""
    names: set[str] = set()
    for source in sources:
        try:
            # Without the tags that transformers adds to Jinja; what is between them stays.
            bare = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
        except jinja2.TemplateError:
            return frozenset(CARRIES)  # the first row is told what is wrong with it
        names |= {node.name for node in tree.find_all(jinja2.nodes.Name)}
        names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        names |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return frozenset(names)


class ChatTemplate:
    """Renders prompts and responses by a tokenizer's chat template; strings too, if `apply` is set."""

    def __init__(self, hf: Any, *, apply: bool, settings: TemplateSettings = PLAIN) -> None:
        self.hf, self.applied = hf, apply
        self._names = _names(_sources(hf))
        self._kwargs = dict(settings.kwargs or {})
        tokens = [token.content for token in hf.added_tokens_decoder.values() if token.special]
        own = [token for token in tokens if any(token in source for source in _sources(hf))]
        self._markers = re.compile("|".join(map(re.escape, own))) if own else None
        if settings.date:
            self._kwargs[CLOCK] = datetime.date.fromisoformat(settings.date).strftime

    def render(
        self, source: str, prompt: TextOrMessages, response: TextOrMessages, template: dict[str, Any]
    ) -> Rendered:
        """Return the text of the prompt, and the text of the response after it."""
        if isinstance(prompt, str) and isinstance(response, str) and not self.applied:
            if template:
                raise RowError(
                    f"{source}: has {', '.join(map(repr, template))}, which a chat template writes, but prompt and "
                    "response are texts; give messages, or set data.apply_chat_template=True"
                )
            return Rendered(prompt, response)
        messages, answer = _as_messages(prompt, "user"), _as_messages(response, "assistant")
        self._check_template(source, messages + answer, template)
        self._check_calls(source, messages + answer, template)
        for text in (prompt, response):
            self._check_bare(source, text)
        if messages[-1]["role"] == "assistant":
            return self._continued(source, messages, answer, template)
        prompt_text = self.apply(source, messages, template, add_generation_prompt=True)
        full_text = self.apply(source, messages + answer, template)
        whole = all(_written(message, full_text[len(prompt_text) :]) for message in answer)
        if not full_text.startswith(prompt_text) or not whole:
            return Rendered(prompt_text, self._verbatim(source, messages, answer, prompt_text, template), True)
        scored = self._scored(source, messages, answer, prompt_text, full_text, template) if len(answer) > 1 else ()
        return Rendered(prompt_text, full_text[len(prompt_text) :], True, scored)

    def _continued(
        self, source: str, messages: list[Message], answer: list[Message], template: dict[str, Any]
    ) -> Rendered:
        """Render an answer that goes on with the prompt's last message, which is the assistant's."""
        begun, first = messages[-1], answer[0]
        if set(begun) - {"role", "content"} or set(first) - {"role", "content"} or len(answer) > 1:
            raise RowError(
                f"{source}: the prompt ends with the assistant's message, which the response goes on with; that can be "
                "text alone, without calls or thoughts"
            )
        prompt_text = self.apply(source, messages, template, continue_final_message=True)
        joined = {**begun, "content": begun["content"] + first["content"]}
        full_text = self.apply(source, [*messages[:-1], joined], template)
        if not full_text.startswith(prompt_text):
            raise RowError(
                f"{source}: the prompt ends with the assistant's message, and the chat template does not write the "
                f"response after it: prompt {prompt_text[-80:]!r}, with response {full_text[-400:]!r}"
            )
        return Rendered(prompt_text, full_text[len(prompt_text) :], True)

    def _scored(
        self,
        source: str,
        messages: list[Message],
        answer: list[Message],
        prompt_text: str,
        full_text: str,
        template: dict[str, Any],
    ) -> tuple[tuple[int, int], ...]:
        """Return the parts of a response of several messages that the assistant says, in characters."""
        found: list[tuple[int, int]] = []
        for i, message in enumerate(answer):
            if message["role"] != "assistant" or not message.get("weight", 1):
                continue
            before = self.apply(source, messages + answer[:i], template, add_generation_prompt=True)
            after = self.apply(source, messages + answer[: i + 1], template)
            written = _written_part(after[len(before) :], full_text[len(before) :])
            if not full_text.startswith(before) or not after.startswith(before) or written is None:
                raise RowError(
                    f"{source}: the chat template writes message {i} of the response differently once others follow, "
                    "so its tokens cannot be told apart; give the last message as the response, others in the prompt"
                )
            begin = len(before) - len(prompt_text)
            # Blanks after the end of a turn belong to the template.
            found.append((begin, begin + len(written.rstrip())))
        return tuple(found)

    def _verbatim(
        self,
        source: str,
        messages: list[Message],
        answer: list[Message],
        prompt_text: str,
        template: dict[str, Any],
    ) -> str:
        """Return an answer as the model says it, where the template rewrites it as a part of the history.

        DeepSeek-R1's opens a thought after the prompt and takes the thought out of every answer.
        """
        marked = self.apply(source, [*messages, said(MARK)], template)
        before, found, end = marked.rpartition(MARK)
        content = answer[0].get("content") or ""
        if not found or not prompt_text.startswith(before) or len(answer) > 1 or set(answer[0]) - {"role", "content"}:
            full_text = self.apply(source, messages + answer, template)
            what = (
                "differently once an answer follows" if not full_text.startswith(prompt_text) else "without its answer"
            )
            raise RowError(
                f"{source}: the chat template writes the prompt {what}, so the answer's tokens cannot be told apart: "
                f"prompt {prompt_text[-80:]!r}, with answer {full_text[:400]!r}"
            )
        opened = prompt_text[len(before) :]
        if not content.lstrip().startswith(opened.strip()):
            raise RowError(
                f"{source}: the chat template opens each answer with {opened!r}, and this one begins with "
                f"{content[:40]!r}; write the whole answer, as the model is to say it"
            )
        return content.lstrip()[len(opened.strip()) :].removeprefix(opened[len(opened.rstrip()) :]) + end

    def opening(self, source: str, prompt: TextOrMessages, template: dict[str, Any]) -> str:
        """Return what the template begins an answer with and takes out of the history, as `<think>`; mostly nothing."""
        if isinstance(prompt, str) and not self.applied:
            return ""
        messages = _as_messages(prompt, "user")
        if messages[-1]["role"] == "assistant" or not self.hf.chat_template:
            return ""
        prompt_text = self.apply(source, messages, template, add_generation_prompt=True)
        before, found, _ = self.apply(source, [*messages, said(MARK)], template).rpartition(MARK)
        return prompt_text[len(before) :] if found and prompt_text.startswith(before) else ""

    def _check_template(self, source: str, messages: list[Message], template: dict[str, Any]) -> None:
        if not self.hf.chat_template and self.applied:
            raise RowError(
                f"{source}: the tokenizer has no chat template to apply; set data.apply_chat_template=False (in a "
                "command, apply_chat_template=False) if the texts are as the model is to see them, or give a "
                "tokenizer with one"
            )
        if not self.hf.chat_template:
            raise RowError(
                f"{source}: holds messages, but the tokenizer has no chat template; give strings with the "
                "template's tokens written out, or a tokenizer with a template"
            )
        held = {key for message in messages for key in message} | set(template)
        lost = [key for key in CARRIES if key in held and key not in self._names]
        if lost:
            raise RowError(
                f"{source}: has {', '.join(map(repr, lost))}, which the tokenizer's chat template does not write, so "
                "it would be lost; use the template of a model that has it, or take it out of the row"
            )

    def _check_calls(self, source: str, messages: list[Message], template: dict[str, Any]) -> None:
        """Refuse tools and calls that a template mentions and does not write: it is given marks for their names."""
        marks: list[tuple[str, str]] = []

        def marked(key: str, item: dict[str, Any]) -> dict[str, Any]:
            function = item.get("function", item)
            marks.append((key, function.get("name", "")))
            named = {**function, "name": f"{MARK}{len(marks)}{MARK}"}
            return {**item, "function": named} if "function" in item else named

        shown = [
            {**m, "tool_calls": [marked("tool_calls", call) for call in m["tool_calls"]]} if "tool_calls" in m else m
            for m in messages
        ]
        tools = [marked("tools", tool) for tool in template.get("tools") or ()]
        if not marks:
            return
        text = self.apply(source, shown, {**template, **({"tools": tools} if tools else {})})
        for number, (key, name) in enumerate(marks, start=1):
            if f"{MARK}{number}{MARK}" not in text and f"{ESCAPED}{number}{ESCAPED}" not in text:
                raise RowError(
                    f"{source}: the chat template does not write {name!r} of {key!r}, so it would be lost; use another "
                    "template, or take it out of the row"
                )

    def _check_bare(self, source: str, text: TextOrMessages) -> None:
        """Refuse a text that holds the template's own tokens already, as NeMo-Aligner's data do."""
        found = self._markers.search(text) if self._markers and isinstance(text, str) else None
        if found:
            raise RowError(
                f"{source}: holds {found[0]!r}, which the chat template writes, and would get the template once more; "
                "set data.apply_chat_template=False (in a command, apply_chat_template=False), or take the template's "
                "tokens out of the texts",
                fault="templated-prompt",
            )

    def apply(self, source: str, messages: list[Message], template: dict[str, Any], **how: Any) -> str:
        """Render messages by the chat template."""
        shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        arguments = {**self._kwargs, **template, **how}
        try:
            text = self._rendered(shown, arguments)
            if any(message.get("content", "") is None for message in shown):
                # Some templates write "None" for a call without a text beside it.
                filled = [{**m, "content": ""} if m.get("content", "") is None else m for m in shown]
                without = self._rendered(filled, arguments)
                text = without if without.count("None") < text.count("None") else text
            return text
        except Exception as error:  # the template is a program of somebody else's
            roles = ", ".join(message["role"] for message in messages)
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise RowError(f"{source}: the chat template refuses these messages ({roles}): {kind}{error}") from None

    def _rendered(self, messages: list[Message], arguments: dict[str, Any]) -> str:
        with time_limit(TEMPLATE_S):
            return self._rendered_unlimited(messages, arguments)

    def _rendered_unlimited(self, messages: list[Message], arguments: dict[str, Any]) -> str:
        try:
            return self.hf.apply_chat_template(messages, tokenize=False, **arguments)
        except TypeError:
            # DeepSeek's templates take the arguments of calls as JSON, others as an object.
            if not any("tool_calls" in message for message in messages):
                raise
            return self.hf.apply_chat_template(list(map(_with_json, messages)), tokenize=False, **arguments)


def _as_messages(text: TextOrMessages, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _written(message: Message, text: str) -> bool:
    """Return whether the text has content and thought of an answer, but for blanks."""
    if message["role"] != "assistant":
        return True
    written = "".join(text.split())
    return all("".join(str(message.get(key) or "").split()) in written for key in ("content", *THOUGHTS))


def _written_part(alone: str, rest: str) -> str | None:
    """Return how a message that a template writes as `alone` begins `rest`: Qwen3's leaves out an empty thought."""
    return next((alone[i:] for i in range(len(alone)) if alone[i:].strip() and rest.startswith(alone[i:])), None)


def _with_json(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        text = {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}
        calls.append({**call, "function": text} if "function" in call else text)
    return {**message, "tool_calls": calls} if calls else message
