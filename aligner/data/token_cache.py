"""Tokens on disk: made once by all cores, then memory-mapped by every rank of every run.

A file of rows becomes a folder named by a hash of all that its tokens depend on: the content of the file, the tokenizer
with its chat template, the settings, and the code's `VERSION`. It holds

    tokens.arrow    an Arrow stream (`datasets.Dataset.from_file` reads it): prompt, one column a response, rewards,
                    desirable, line, prompt_hash
    meta.json       what became of the rows, and what the name was made of

The folder takes its name when it is whole, under a lock: a killed process leaves nothing that is taken for whole, and
of two that start together one waits for the other. Deleting folders is safe; they are made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from aligner.common import process_pool
from aligner.common.files import atomic_write
from aligner.common.hashing import content_hash, short_hash, tokenizer_hash
from aligner.data.examples import Example, Kind, Overlong, TokenizationStats, examples
from aligner.data.rows import FormatCounts, Row, parse_line
from aligner.data.sources import CHUNK, Chunk, chunks
from aligner.data.tokenization import ResponseTokenizer

VERSION = 1
"""Raise this when the same row would become other tokens: older folders are then passed over."""

TOKENS, META = "tokens.arrow", "meta_judge.json"


@dataclass(frozen=True)
class TokenizationConfig:
    """What a row's tokens depend on, beside the row and the tokenizer."""

    kind: Kind
    seq_length: int
    apply_chat_template: bool = False
    overlong: Overlong = "drop"

    @property
    def responses(self) -> tuple[str, ...]:
        """Names of the columns that hold them."""
        return ("chosen", "rejected") if self.kind == "pairs" else ("response",)


# ---- reading ----------------------------------------------------------------------------------------------------


class TokenFile(Sequence[Example]):
    """The examples of one file, read from its folder as they are asked for."""

    def __init__(self, folder: Path, path: str) -> None:
        """Open `folder`; `path` is the file that its rows came from, for messages.

        Raises:
            ValueError, OSError: the folder is not whole.
        """
        meta = json.loads((folder / META).read_text())
        if (folder / TOKENS).stat().st_size != meta["bytes"]:
            raise ValueError(f"{TOKENS} has {(folder / TOKENS).stat().st_size} bytes, written were {meta['bytes']}")
        self.folder, self.path, self.meta = folder, path, meta
        self.settings = TokenizationConfig(**meta["settings"])
        self.report = TokenizationStats(**{**meta["report"], "dropped": Counter(meta["report"]["dropped"])})
        with pa.memory_map(str(folder / TOKENS)) as mapped:
            self._batches = pa.ipc.open_stream(mapped).read_all().to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Any) -> Example:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, place = self._batches[number], int(row - self._starts[number])
        values = {name: batch.column(name)[place] for name in batch.schema.names}
        tokens = {name: _values(value).tolist() for name, value in values.items() if isinstance(value, pa.ListScalar)}
        return Example(
            source=f"{self.path}:{values['line'].as_py()}",
            prompt=tokens.pop("prompt"),
            responses=tuple(tokens[name] for name in self.settings.responses),
            rewards=(values["chosen_reward"].as_py(), values["rejected_reward"].as_py()),
            desirable=values["desirable"].as_py(),
        )

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt and of each response to it, int32 `[examples, 1 + K]`."""
        return np.stack([self._lengths(name) for name in ("prompt", *self.settings.responses)], axis=1)

    @functools.cached_property
    def prompt_hashes(self) -> np.ndarray:
        """64 bits of each prompt's tokens: equal prompts have equal ones."""
        found = [batch.column("prompt_hash").to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _lengths(self, name: str) -> np.ndarray:
        found = [np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int32), *found])


def _values(value: Any) -> np.ndarray:
    return value.values.to_numpy()


# ---- making -----------------------------------------------------------------------------------------------------


def token_files(
    paths: Sequence[Path],
    tokenizer: Any,
    settings: TokenizationConfig,
    folder: Path,
    *,
    log: Callable[[str], None] = print,
) -> list[TokenFile]:
    """The examples of the rows in files, from their places in `folder`, where they are put if they are not there yet.

    Raises:
        RowError: a row is not as it must be; nothing of its file is kept then.
    """
    hf = getattr(tokenizer, "tokenizer", tokenizer)
    shared = {"tokenizer": tokenizer_hash(hf), "settings": asdict(settings), "version": VERSION}
    return [_token_file(path, hf, settings, folder, shared, log) for path in paths]


def _token_file(
    path: Path, hf: Any, settings: TokenizationConfig, folder: Path, shared: dict[str, Any], log: Callable[[str], None]
) -> TokenFile:
    parts = {"content": content_hash(path, folder), **shared}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / key
    found = _open(place, path, log)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        log(f"{path}: another process is tokenizing it; waiting for it to finish")
        lock.acquire()
    try:
        found = _open(place, path, log)
        if found is None:
            for left in [place, *folder.glob(f"{key}.*.partial")]:
                shutil.rmtree(left, ignore_errors=True)
            with atomic_write(place) as partial:
                partial.mkdir()
                _make(path, hf, settings, partial, parts)
            found = TokenFile(place, str(path))
    finally:
        lock.release()
    return found


def _open(place: Path, path: Path, log: Callable[[str], None]) -> TokenFile | None:
    try:
        return TokenFile(place, str(path)) if place.exists() else None
    except (ValueError, OSError, KeyError, TypeError) as error:
        log(f"{place} is damaged ({error}) and will be made again")
        return None


@dataclass
class _Encoded:
    """What became of a chunk of lines."""

    batch: bytes
    digests: bytes
    """A hash of each example, end to end."""
    examples: int
    report: TokenizationStats
    census: FormatCounts


def _make(path: Path, hf: Any, settings: TokenizationConfig, folder: Path, parts: dict[str, Any]) -> None:
    report, census, count = TokenizationStats(settings.kind), FormatCounts(), 0
    digest = hashlib.sha256(json.dumps(parts["settings"]["kind"]).encode())
    with (
        pa.OSFile(str(folder / TOKENS), "wb") as file,
        pa.ipc.new_stream(file, _schema(settings)) as writer,
    ):
        for encoded in map_chunks(path, functools.partial(_encoder, hf, settings), f"Tokens of {path.name}"):
            report.merge(encoded.report)
            census.merge(encoded.census)
            count += encoded.examples
            digest.update(encoded.digests)
            writer.write_batch(pa.ipc.read_record_batch(pa.py_buffer(encoded.batch), _schema(settings)))
    census.check(path)
    meta = {
        "bytes": (folder / TOKENS).stat().st_size,
        "examples": count,
        "fingerprint": digest.hexdigest(),
        "report": {**vars(report), "dropped": dict(report.dropped)},
        **parts,
    }
    (folder / META).write_text(json.dumps(meta, indent=1))


def map_chunks(path: Path, make: Callable[[], Callable[[Chunk], Any]], title: str) -> Any:
    """`make()` of each chunk of a file's lines, in order, by all cores if the file is large, with a progress bar."""
    size = path.stat().st_size
    workers = min(process_pool.cores(), size // (4 * CHUNK))
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=size < CHUNK, leave=False) as bar:
        for chunk, result in process_pool.ordered_map(make, chunks(path), workers=workers):
            bar.update(chunk.read - bar.n)
            yield result


def check_rows(path: Path, folder: Path) -> None:
    """Read the rows of a file for their mistakes alone, once; no tokenizer is needed.

    That they were found good is remembered in `folder`.

    Raises:
        RowError: the first mistake, with its `file:line`.
    """
    good = folder / "files" / f"{content_hash(path, folder)}-{VERSION}.good"
    good.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{good}.lock"):
        if good.exists():
            return
        census = FormatCounts()
        for found in map_chunks(path, _counter, f"Rows of {path.name}"):
            census.merge(found)
        census.check(path)
        good.touch()


def _counter() -> Callable[[Chunk], FormatCounts]:
    return lambda chunk: _rows(chunk)[1]


def _rows(chunk: Chunk) -> tuple[list[Row], FormatCounts]:
    rows, census = [row for text, source in chunk.texts() for row in parse_line(text, source)], FormatCounts()
    for row in rows:
        census.add(row)
    return rows, census


def _encoder(hf: Any, settings: TokenizationConfig) -> Callable[[Chunk], _Encoded]:
    encode = ResponseTokenizer(hf, apply_chat_template=settings.apply_chat_template)

    def encoded(chunk: Chunk) -> _Encoded:
        rows, census = _rows(chunk)
        found, report = examples(
            rows, encode, kind=settings.kind, seq_length=settings.seq_length, overlong=settings.overlong
        )
        batch = pa.record_batch(_columns(found, settings), schema=_schema(settings))
        digests = b"".join(map(_digest, found))
        return _Encoded(batch.serialize().to_pybytes(), digests, len(found), report, census)

    return encoded


def _schema(settings: TokenizationConfig) -> pa.Schema:
    tokens = [(name, pa.list_(pa.int32())) for name in ("prompt", *settings.responses)]
    numbers = [("chosen_reward", pa.float64()), ("rejected_reward", pa.float64()), ("desirable", pa.bool_())]
    return pa.schema([*tokens, *numbers, ("line", pa.int64()), ("prompt_hash", pa.int64())])


def _columns(found: list[Example], settings: TokenizationConfig) -> list[pa.Array]:
    tokens = [[e.prompt for e in found]]
    tokens += [[e.responses[k] for e in found] for k in range(len(settings.responses))]
    return [
        *(pa.array(column, pa.list_(pa.int32())) for column in tokens),
        pa.array([e.rewards[0] for e in found], pa.float64()),
        pa.array([e.rewards[1] for e in found], pa.float64()),
        pa.array([e.desirable for e in found], pa.bool_()),
        pa.array([int(e.source.rpartition(":")[2]) for e in found], pa.int64()),
        pa.array([short_hash(np.asarray(e.prompt, np.int32).tobytes()) for e in found], pa.int64()),
    ]


def _digest(e: Example) -> bytes:
    """Of what an example says, wherever it stands."""
    lengths = [len(e.prompt), *map(len, e.responses)]
    tokens = np.asarray([*lengths, *e.prompt, *(token for r in e.responses for token in r)], np.int32).tobytes()
    return hashlib.blake2b(tokens + repr((e.rewards, e.desirable)).encode(), digest_size=16).digest()
