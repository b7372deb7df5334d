"""Features of each row, as a table: numbers and flags, a few bytes per row, so a million rows fit into memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aligner.common.errors import RowError
from aligner.common.hashing import short_hash
from aligner.data.chat_template import TemplateSettings
from aligner.data.forms.table import Reader
from aligner.data.rows import FormatCounts, PreferenceRow, Row, TextOrMessages
from aligner.data.sources import Chunk
from aligner.data.tokenization import ResponseTokenizer

NEAR_IDENTICAL = 0.95
"""Two responses are near-identical if their common prefix and suffix make up this share of the longer one's characters,
or if they differ only in case, spaces and trailing punctuation."""

MARKS = (
    "near_identical", "same_tokens", "nothing_visible", "merged_at_border", "doubled_bos", "doubled_eos", "role_marker",
    "special_token",
)  # fmt: skip
"""Flags of a row, one bit each."""

TEMPLATE = re.compile(
    r"<\|(?:im_start|im_end|user|assistant|system|end|eot_id|eom_id|start_header_id|end_header_id|endoftext)\|>"
    r"|</?s>|\[/?INST\]|<</?SYS>>|\[/?SYS\]|<(?:start|end)_of_turn>|<extra_id_\d+>"
)
_NAME = r"(?:\*\*|#{2,}[ \t]*)?(?:Human|User|Assistant|System|AI|Instruction|Response)[ \t]*:"
SPEAKER = re.compile(rf"^[ \t]*{_NAME}", re.MULTILINE | re.IGNORECASE)
SPEAKER_AFTER_BLANK = re.compile(rf"\n[ \t]*\n[ \t]*{_NAME}|\A[ \t]*(?:\*\*)?(?:Human|Assistant)[ \t]*:", re.IGNORECASE)
"""Marks of a chat template, and of a speaker: one after a blank line, or two anywhere (`Response: 404` alone may be a
response). A response with such a mark trains the model to generate the other speaker's turns."""

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
"""Hashes of normalized texts (`exact`: of the unmodified row); token counts; chosen minus rejected reward (NaN: no
rewards); `preferred`: 1 or -1 for a desirable or undesirable single response, else 0. `first` is the chosen or single
response; `second_tokens` is -1 for a single response."""


@dataclass
class Bad:
    """A row at which a run would stop."""

    line: int
    fault: str
    message: str


@dataclass
class RowTable:
    """Features of some rows of one file, and its invalid rows."""

    columns: dict[str, np.ndarray]
    bad: list[Bad] = field(default_factory=list)
    counts: FormatCounts = field(default_factory=FormatCounts)
    templated: bool = False
    """Whether a row went through the chat template."""

    @staticmethod
    def concat(parts: list[RowTable]) -> RowTable:
        columns = {
            name: np.concatenate([np.zeros(0, kind), *(part.columns[name] for part in parts)])
            for name, kind in COLUMNS.items()
        }
        counts = FormatCounts()
        for part in parts:
            counts.merge(part.counts)
        return RowTable(columns, [bad for part in parts for bad in part.bad], counts, any(p.templated for p in parts))


def row_table_maker(
    hf: Any, apply_chat_template: bool, template: TemplateSettings, reader: Reader
) -> Callable[[Chunk], RowTable]:
    """Return a function that computes the table of a chunk."""
    encode = ResponseTokenizer(hf, apply_chat_template=apply_chat_template, template=template)
    special = [token.content for token in hf.added_tokens_decoder.values() if token.special]
    specials = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def chunk_table(chunk: Chunk) -> RowTable:
        features: list[tuple[Any, ...]] = []
        bad: list[Bad] = []
        counts, templated = FormatCounts(), False
        # Rows that belong together are read together, and up to the first that cannot be read.
        step = len(chunk.lines) if reader.form.together else 1
        for at in range(0, len(chunk.lines), step):
            first = chunk.first + at
            part = Chunk(chunk.path, first, chunk.lines[at : at + step], chunk.read)
            try:
                for row in reader.rows(part.texts(), counts):
                    number = int(row.source.rpartition(":")[2])
                    features.append(_features(row, number, encode, specials))
                    templated |= apply_chat_template or isinstance(row.prompt, list)
            except RowError as error:
                bad.append(Bad(_line_of(str(error), chunk.path, first), error.fault, str(error)))
        columns = zip(*features, strict=True) if features else [[] for _ in COLUMNS]
        arrays = {n: np.array(c, k) for (n, k), c in zip(COLUMNS.items(), columns, strict=True)}
        return RowTable(arrays, bad, counts, templated)

    return chunk_table


def _features(row: Row, line: int, encode: ResponseTokenizer, specials: re.Pattern[str]) -> tuple[Any, ...]:
    pair = isinstance(row, PreferenceRow)
    raw_responses = [row.chosen_response, row.rejected_response] if pair else [row.response]
    merged = encode.merged
    prompt, responses = encode(row.source, row.prompt, raw_responses, row.template)
    texts = [_text(response) for response in raw_responses]
    bare, ends = zip(*(_strip_end_tokens(text, specials) for text in texts), strict=True)
    same = pair and responses[0] == responses[1]
    marks = {
        "near_identical": pair and not same and _near_identical(*texts),
        "same_tokens": same,
        "nothing_visible": not all(map(_has_visible, bare)),
        "merged_at_border": encode.merged > merged,
        "doubled_bos": bool(encode.bos) and prompt[:2] == encode.bos * 2,
        "doubled_eos": max(ends) > 1 or any(len(t) > 1 and set(t[-2:]) <= encode.special for t in responses),
        "role_marker": any(_has_role_marker(specials.sub("", text)) for text in texts),
        "special_token": any(specials.search(text) for text in bare),
    }
    rewarded = pair and row.chosen_reward is not None and row.rejected_reward is not None
    preferred = 0 if pair or row.desirable is None else (1 if row.desirable else -1)
    hashes = [short_hash(_normalize(text).encode()) for text in texts]
    return (
        line,
        short_hash(repr((row.prompt, raw_responses)).encode()),
        short_hash(_normalize(_text(row.prompt)).encode()),
        hashes[0],
        hashes[1] if pair else 0,
        len(prompt),
        len(responses[0]),
        len(responses[1]) if pair else -1,
        row.chosen_reward - row.rejected_reward if rewarded else np.nan,  # type: ignore[union-attr]
        preferred,
        sum(bool(marks[name]) << bit for bit, name in enumerate(MARKS)),
    )


def _line_of(message: str, path: str, first: int) -> int:
    number = message.removeprefix(f"{path}:").split(":")[0]
    return int(number) if number.isdigit() else first


def _text(text: TextOrMessages) -> str:
    return text if isinstance(text, str) else "\n".join(f"{m.get('content') or ''}" for m in text)


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _near_identical(first: str, second: str) -> bool:
    if len({_normalize(text).rstrip(" .,;:!?…") for text in (first, second)}) == 1:
        return True
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    if shorter < NEAR_IDENTICAL * longer:
        return False
    prefix = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    rest = shorter - prefix
    suffix = next((i for i in range(rest) if first[-1 - i] != second[-1 - i]), rest)
    return prefix + suffix >= NEAR_IDENTICAL * longer


def _strip_end_tokens(text: str, specials: re.Pattern[str]) -> tuple[str, int]:
    """Return the text without trailing special tokens, and their number; a single one is normal."""
    matches, ends = list(specials.finditer(text)), 0
    while matches and not text[matches[-1].end() :].strip():
        text, ends = text[: matches.pop().start()], ends + 1
    return text, ends


def _has_visible(text: str) -> bool:
    return any(unicodedata.category(letter)[0] not in "CZ" for letter in text)


def _has_role_marker(text: str) -> bool:
    if TEMPLATE.search(text) or SPEAKER_AFTER_BLANK.search(text):
        return True
    return len(SPEAKER.findall(text)) > 1
