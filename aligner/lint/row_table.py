"""What a lint looks at in each row: numbers and marks, a few bytes a row, so that a million rows fit into memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aligner.common.errors import RowError
from aligner.common.hashing import short_hash
from aligner.data.rows import PreferenceRow, Row, TextOrMessages, parse_line
from aligner.data.sources import Chunk
from aligner.data.tokenization import ResponseTokenizer

NEAR_IDENTICAL = 0.95
"""Two answers are near-identical if a common beginning and end make up this share of the longer one's characters, or if
they differ in case, spaces and the punctuation at their end only."""

MARKS = (
    "near_identical", "same_tokens", "nothing_visible", "merged_at_border", "doubled_bos", "doubled_eos", "role_marker",
    "special_token",
)  # fmt: skip
"""What is marked of a row, bit by bit."""

TEMPLATE = re.compile(
    r"<\|(?:im_start|im_end|user|assistant|system|end|eot_id|eom_id|start_header_id|end_header_id|endoftext)\|>"
    r"|</?s>|\[/?INST\]|<</?SYS>>|\[/?SYS\]|<(?:start|end)_of_turn>|<extra_id_\d+>"
)
_WHO = r"(?:\*\*|#{2,}[ \t]*)?(?:Human|User|Assistant|System|AI|Instruction|Response)[ \t]*:"
SPEAKER = re.compile(rf"^[ \t]*{_WHO}", re.MULTILINE | re.IGNORECASE)
SPEAKER_AFTER_BLANK = re.compile(rf"\n[ \t]*\n[ \t]*{_WHO}|\A[ \t]*(?:\*\*)?(?:Human|Assistant)[ \t]*:", re.IGNORECASE)
"""Signs of a template, and of a speaker: after a blank line, or two of them (`Response: 404` alone may be an answer).
An answer that holds one teaches the model to speak for the other side, too."""

COLUMNS: dict[str, Any] = {
    "line": np.int64,
    "exact": np.int64,
    "prompt": np.int64,
    "first": np.int64,
    "second": np.int64,
    "prompt_tokens": np.int32,
    "first_tokens": np.int32,
    "second_tokens": np.int32,
    "gap": np.float64,
    "preferred": np.int8,
    "marks": np.int32,
}
"""Hashes of normalized texts (`exact`: of the row as it stands); tokens; chosen minus rejected reward (NaN: none); 1 or
-1 for a single response that is wanted or not. `first` is the chosen or single response; `second_tokens` is -1 where
there is one response."""


@dataclass
class Bad:
    """A row that a run would stop at."""

    line: int
    fault: str
    message: str


@dataclass
class RowTable:
    """Of some rows of one file."""

    columns: dict[str, np.ndarray]
    bad: list[Bad] = field(default_factory=list)

    @staticmethod
    def joined(parts: list[RowTable]) -> RowTable:
        columns = {
            name: np.concatenate([np.zeros(0, kind), *(part.columns[name] for part in parts)])
            for name, kind in COLUMNS.items()
        }
        return RowTable(columns, [bad for part in parts for bad in part.bad])


def row_table_maker(hf: Any, apply_chat_template: bool) -> Callable[[Chunk], RowTable]:
    """A function that looks at a chunk of lines."""
    encode = ResponseTokenizer(hf, apply_chat_template=apply_chat_template)
    special = [token.content for token in hf.added_tokens_decoder.values() if token.special]
    specials = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def look(chunk: Chunk) -> RowTable:
        found: list[tuple[Any, ...]] = []
        bad: list[Bad] = []
        for number, line in enumerate(chunk.lines, start=chunk.first):
            one = Chunk(chunk.path, number, [line], chunk.read)
            try:
                for text, source in one.texts():
                    found += [_facts(row, number, encode, specials) for row in parse_line(text, source)]
            except RowError as error:
                bad.append(Bad(number, error.fault, str(error)))
        columns = zip(*found, strict=True) if found else [[] for _ in COLUMNS]
        arrays = {n: np.array(c, k) for (n, k), c in zip(COLUMNS.items(), columns, strict=True)}
        return RowTable(arrays, bad)

    return look


def _facts(row: Row, line: int, encode: ResponseTokenizer, specials: re.Pattern[str]) -> tuple[Any, ...]:
    pair = isinstance(row, PreferenceRow)
    answers = [row.chosen_response, row.rejected_response] if pair else [row.response]
    merged = encode.merged
    prompt, responses = encode(row.source, row.prompt, answers)
    texts = [_plain(answer) for answer in answers]
    bare, ends = zip(*(_without_ends(text, specials) for text in texts), strict=True)
    same = pair and responses[0] == responses[1]
    marks = {
        "near_identical": pair and not same and _near(*texts),
        "same_tokens": same,
        "nothing_visible": not all(map(_visible, bare)),
        "merged_at_border": encode.merged > merged,
        "doubled_bos": bool(encode.bos) and prompt[:2] == encode.bos * 2,
        "doubled_eos": max(ends) > 1 or any(len(t) > 1 and set(t[-2:]) <= encode.special for t in responses),
        "role_marker": any(_speaks_for_others(specials.sub("", text)) for text in texts),
        "special_token": any(specials.search(text) for text in bare),
    }
    rewarded = pair and row.chosen_reward is not None and row.rejected_reward is not None
    preferred = 0 if pair or row.desirable is None else (1 if row.desirable else -1)
    hashes = [short_hash(_normal(text).encode()) for text in texts]
    return (
        line,
        short_hash(repr((row.prompt, answers)).encode()),
        short_hash(_normal(_plain(row.prompt)).encode()),
        hashes[0],
        hashes[1] if pair else 0,
        len(prompt),
        len(responses[0]),
        len(responses[1]) if pair else -1,
        row.chosen_reward - row.rejected_reward if rewarded else np.nan,  # type: ignore[union-attr]
        preferred,
        sum(bool(marks[name]) << bit for bit, name in enumerate(MARKS)),
    )


def _plain(text: TextOrMessages) -> str:
    return text if isinstance(text, str) else "\n".join(f"{m['content']}" for m in text)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _near(one: str, other: str) -> bool:
    if len({_normal(text).rstrip(" .,;:!?…") for text in (one, other)}) == 1:
        return True
    longer, shorter = max(len(one), len(other)), min(len(one), len(other))
    if shorter < NEAR_IDENTICAL * longer:
        return False
    same = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    rest = shorter - same
    end = next((i for i in range(rest) if one[-1 - i] != other[-1 - i]), rest)
    return same + end >= NEAR_IDENTICAL * longer


def _without_ends(text: str, specials: re.Pattern[str]) -> tuple[str, int]:
    """The text before the special tokens that it ends in, and how many these are; one is as it may be."""
    found, ends = list(specials.finditer(text)), 0
    while found and not text[found[-1].end() :].strip():
        text, ends = text[: found.pop().start()], ends + 1
    return text, ends


def _visible(text: str) -> bool:
    return any(unicodedata.category(letter)[0] not in "CZ" for letter in text)


def _speaks_for_others(text: str) -> bool:
    if TEMPLATE.search(text) or SPEAKER_AFTER_BLANK.search(text):
        return True
    return len(SPEAKER.findall(text)) > 1
