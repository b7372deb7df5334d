"""Prompt files: JSON lines with `prompt` (a string or OpenAI-style messages), an optional `id`, and other keys.

Verifiers receive the other keys of a line, for example `answer`; `spin` uses its `response`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.common.console import log_rank0
from aligner.common.errors import RowError
from aligner.common.files import atomic_write
from aligner.data import rows, sources
from aligner.data.forms.messages import TEMPLATE_KEYS, template_arguments, text_of
from aligner.data.rows import TextOrMessages


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file."""

    id: str
    """`id` of the line, or else a hash of the prompt, which does not depend on the line's position."""
    prompt: TextOrMessages
    template: dict[str, Any]
    """What the chat template gets beside the messages: `tools`, and the line's `chat_template_kwargs`."""
    row: dict[str, Any]
    source: str

    def as_row(self) -> dict[str, Any]:
        """Return the keys of a row with this prompt: `prompt`, and what the chat template gets."""
        return {"prompt": self.prompt, **{key: self.row[key] for key in TEMPLATE_KEYS if self.row.get(key)}}


def read_prompts(source: Any) -> list[Prompt]:
    """Read the prompts of a file, a folder or several; log repeated prompts and return them once.

    Raises:
        RowError: a line is invalid, two different prompts have the same id, or there are no prompts.
    """
    by_id: dict[str, Prompt] = {}
    repeated: list[str] = []
    for prompt in _lines(source):
        first = by_id.setdefault(prompt.id, prompt)
        if first is prompt:
            continue
        if (first.prompt, first.template) != (prompt.prompt, prompt.template):
            raise RowError(f"{prompt.source}: has the id {prompt.id!r} of {first.source}; ids must differ")
        repeated.append(prompt.source)
    if repeated:
        shown = ", ".join(repeated[:5]) + (", ..." if len(repeated) > 5 else "")
        log_rank0(f"prompts: {len(repeated)} stand in the file before, and are asked once: {shown}")
    if not by_id:
        raise RowError(f"{source}: holds 0 different prompts, and at least 1 are needed")
    return list(by_id.values())


def share(source: Any, number: int, of: int, output: str) -> str:
    """Write a share of the prompts of a file: every `of`-th different one from the `number`-th on; return the output.

    Together the shares have every prompt once. A file that is there already stays.

    Args:
        source: file, folder or list of files of prompts.
        number: number of the share, from 1.
        of: number of shares.
        output: file to write.

    Raises:
        RowError: a line is invalid, there are fewer prompts than shares, or the output has other prompts.
    """
    path = Path(output).expanduser()
    lines = [json.dumps(prompt.row, ensure_ascii=False) for prompt in read_for_shares(source, of)[number - 1 :: of]]
    content = "\n".join(lines) + "\n"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(content)
    elif path.read_text() != content:
        raise RowError(
            f"{path}: holds other prompts than share {number} of {of} of {source}; were the prompts or the number of "
            "iterations changed? Remove it, or give a list with one file of prompts per iteration"
        )
    return str(path)


def read_for_shares(source: Any, of: int) -> list[Prompt]:
    """Read the prompts of a file that is divided.

    Raises:
        RowError: a line is invalid, or there are fewer prompts than shares.
    """
    prompts = read_prompts(source)
    if len(prompts) < of:
        raise RowError(f"{source}: holds {len(prompts)} different prompts for {of} iterations with new ones in each")
    return prompts


class PromptIndex:
    """Prompts by the keys of their responses."""

    def __init__(self, source: Any, answers: str) -> None:
        """`answers` is the path of the file of responses, for error messages."""
        self.source, self.answers = source, answers
        self._by_id = {prompt.id: prompt for prompt in read_prompts(source)}

    def prompt(self, key: str) -> Prompt:
        """Return the prompt of the response with the key `id/sample`.

        Raises:
            RowError: the prompt file does not contain the prompt.
        """
        prompt_id = parent_key(key)
        if prompt_id not in self._by_id:
            raise RowError(
                f"{self.answers}: answers a prompt {prompt_id!r}, which {self.source} does not hold; was it changed?"
            )
        return self._by_id[prompt_id]


def parent_key(key: str) -> str:
    """Return the prompt's id from a response's key (`id/sample`), or the response's key from a judgment's."""
    return key.rpartition("/")[0]


def _lines(source: Any) -> Iterator[Prompt]:
    # A callable writes the file, as for `data.train`.
    for part in sources.resolve_files(source() if callable(source) else source, "prompts"):
        for chunk in sources.chunks(part.path):
            for text, where in chunk.texts():
                yield _parse(text, where)


def _parse(line: str, source: str) -> Prompt:
    row = rows.load_json(line, source)
    if "prompt" not in row and isinstance(row.get("messages"), list):
        # The prompt of a conversation: its last user message and all messages before it.
        messages = row["messages"]
        last = max((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), default=-1)
        row = {**row, "prompt": messages[: last + 1]}
    prompt = text_of(row, "prompt", source)
    if isinstance(prompt, list) and prompt[-1]["role"] == "system":
        raise RowError(f"{source}: the last message of 'prompt' is the system's; there is nothing to answer")
    name = row.get("id")
    if name is not None and not isinstance(name, str | int):
        raise RowError(f"{source}: 'id' must be a string or a whole number, found {name!r}")
    template = template_arguments(row, source)
    parts = [prompt, template] if template else prompt
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:12]
    return Prompt(str(name) if name is not None else digest, prompt, template, row, source)
