"""Files of prompts: JSON lines with `prompt` (a string, or OpenAI-style messages), and perhaps `id` and more.

What else a line holds is passed on to verifiers, `answer` for example, and to `spin`, which takes its `response`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aligner.common.console import log_rank0
from aligner.common.errors import RowError
from aligner.data import rows, sources
from aligner.data.rows import TextOrMessages


@dataclass(frozen=True, slots=True)
class Prompt:
    """A line of a file of prompts."""

    id: str
    """Its `id`, or else a hash of the prompt, so that it is the same wherever it stands."""
    prompt: TextOrMessages
    row: dict[str, Any]
    source: str


def read_prompts(source: Any) -> list[Prompt]:
    """All prompts of a file, a folder or several; one that stands there again is read once, which is said.

    Raises:
        RowError: a line is not as it must be, two prompts have one id, or there are none.
    """
    found: dict[str, Prompt] = {}
    again: list[str] = []
    for prompt in _lines(source):
        held = found.setdefault(prompt.id, prompt)
        if held is prompt:
            continue
        if held.prompt != prompt.prompt:
            raise RowError(f"{prompt.source}: has the id {prompt.id!r} of {held.source}; ids must differ")
        again.append(prompt.source)
    if again:
        shown = ", ".join(again[:5]) + (", ..." if len(again) > 5 else "")
        log_rank0(f"prompts: {len(again)} stand in the file before, and are asked once: {shown}")
    if not found:
        raise RowError(f"{source}: holds 0 different prompts, and at least 1 are needed")
    return list(found.values())


class PromptIndex:
    """Prompts, found by the keys of answers to them."""

    def __init__(self, source: Any, answers: str) -> None:
        """`answers` is the file that holds them, for messages."""
        self.source, self.answers = source, answers
        self._by_id = {prompt.id: prompt for prompt in read_prompts(source)}

    def prompt(self, key: str) -> Prompt:
        """What the answer `id/sample` answers.

        Raises:
            RowError: the file of prompts does not hold it.
        """
        name = parent_key(key)
        if name not in self._by_id:
            raise RowError(
                f"{self.answers}: answers a prompt {name!r}, which {self.source} does not hold; was it changed?"
            )
        return self._by_id[name]


def parent_key(key: str) -> str:
    """What a key is of: the prompt's id of an answer's (`id/sample`), the answer's of a judgment's."""
    return key.rpartition("/")[0]


def _lines(source: Any) -> Iterator[Prompt]:
    # A function makes the file, as for `data.train`.
    for part in sources.resolve_files(source() if callable(source) else source, "prompts"):
        for chunk in sources.chunks(part.path):
            for text, where in chunk.texts():
                yield _parse(text, where)


def _parse(line: str, source: str) -> Prompt:
    row = rows.loaded(line, source)
    if "prompt" not in row and isinstance(row.get("messages"), list):
        # A conversation: what is to be answered is its last user message, with all before it.
        messages = row["messages"]
        last = max((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), default=-1)
        row = {**row, "prompt": messages[: last + 1]}
    prompt = rows.text_of(row, "prompt", source)
    if isinstance(prompt, list) and prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(
            f"{source}: the last message of 'prompt' is the {prompt[-1]['role']}'s; there is nothing to answer"
        )
    name = row.get("id")
    if name is not None and not isinstance(name, str | int):
        raise RowError(f"{source}: 'id' must be a string or a whole number, found {name!r}")
    digest = hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()[:12]
    return Prompt(str(name) if name is not None else digest, prompt, row, source)
