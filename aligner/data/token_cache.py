"""Token cache on disk: written once by all cores, memory-mapped by every rank of every run.

A file of rows becomes a folder. The folder's name is a hash of everything that determines the tokens: the content of
the file, the tokenizer with its chat template, the settings, and the code's `VERSION`. The folder contains

    tokens.arrow    an Arrow stream (`datasets.Dataset.from_file` reads it): prompt, two columns per response (tokens,
                    positions that are not scored), rewards, desirable, line, prompt_hash
    meta.json       tokenization statistics, the form of the rows, and the inputs of the hash

A complete folder is renamed to its final name, under a lock: a killed process leaves no folder that looks complete, and
concurrent processes wait for the first. Folders can be deleted; they are rebuilt.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from aligner.common import process_pool
from aligner.common.console import messages
from aligner.common.files import atomic_write
from aligner.common.hashing import content_hash, damage_hash, sealed, short_hash, tokenizer_hash, unsealed
from aligner.common.locking import Lock
from aligner.data.chat_template import TemplateSettings
from aligner.data.examples import Example, Kind, Overlong, TokenizationStats, examples
from aligner.data.forms.form import Options, RankedPairs
from aligner.data.forms.table import Reader
from aligner.data.rows import FormatCounts, Row
from aligner.data.sources import CHUNK, Chunk, chunks, reader_of
from aligner.data.tokenization import ResponseTokenizer

VERSION = 3
"""Increase this when the tokens of an unchanged row would change; older folders are then ignored."""

TOKENS, META = "tokens.arrow", "meta.json"
UNSCORED = "unscored_"
"""Begins the names of columns with the positions of a response that are context."""


@dataclass(frozen=True)
class TokenizationConfig:
    """Settings that determine the tokens of a row, besides the row and the tokenizer."""

    kind: Kind
    seq_length: int
    apply_chat_template: bool = False
    overlong: Overlong = "drop"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    """Day that the chat template writes; empty if it writes none."""
    ranked_pairs: RankedPairs = "best_worst"
    ignore_columns: list[str] = field(default_factory=list)

    @property
    def template(self) -> TemplateSettings:
        """What the chat template gets."""
        return TemplateSettings(self.chat_template_kwargs, self.date)

    @property
    def forms(self) -> Options:
        """Settings of the forms of rows."""
        return Options(self.ranked_pairs, tuple(self.ignore_columns))

    @property
    def responses(self) -> tuple[str, ...]:
        """Names of the response columns."""
        return ("chosen", "rejected") if self.kind == "pairs" else ("response",)


# ---- reading ----------------------------------------------------------------------------------------------------


class TokenFile(Sequence[Example]):
    """Examples of one tokenized file, read lazily from its folder."""

    def __init__(self, folder: Path, path: str) -> None:
        """Open `folder`; `path` is the source file of the rows, for error messages.

        Raises:
            ValueError, OSError: the folder is incomplete.
        """
        meta = unsealed((folder / META).read_text())
        tokens = folder / TOKENS
        if tokens.stat().st_size != meta["bytes"]:
            raise ValueError(f"{TOKENS} has {tokens.stat().st_size} bytes, written were {meta['bytes']}")
        if _content(tokens, tokens.stat().st_mtime_ns) != meta["tokens"]:
            raise ValueError(f"{TOKENS} is not what was written")
        self.folder, self.path, self.meta = folder, path, meta
        self.settings = TokenizationConfig(**meta["settings"])
        self.report = TokenizationStats(
            **{**meta["report"], **{name: Counter(meta["report"][name]) for name in ("dropped", "left")}}
        )
        with pa.memory_map(str(folder / TOKENS)) as mapped:
            self._batches = pa.ipc.open_stream(mapped).read_all().to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Any) -> Example:
        batch_index = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, position = self._batches[batch_index], int(row - self._starts[batch_index])
        values = {name: batch.column(name)[position] for name in batch.schema.names}
        tokens = {n: _list_array(value).tolist() for n, value in values.items() if isinstance(value, pa.ListScalar)}
        unscored = tuple(tokens.pop(f"{UNSCORED}{name}") for name in self.settings.responses)
        return Example(
            source=f"{self.path}:{values['line'].as_py()}",
            prompt=tokens.pop("prompt"),
            responses=tuple(tokens[name] for name in self.settings.responses),
            rewards=(values["chosen_reward"].as_py(), values["rejected_reward"].as_py()),
            desirable=values["desirable"].as_py(),
            unscored=unscored if any(unscored) else (),
        )

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt and of each of its responses, int32 `[examples, 1 + K]`."""
        return np.stack([self._lengths(name) for name in ("prompt", *self.settings.responses)], axis=1)

    @functools.cached_property
    def prompt_hashes(self) -> np.ndarray:
        """64-bit hashes of the prompts' tokens; equal prompts have equal hashes."""
        hashes = [batch.column("prompt_hash").to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *hashes])

    @property
    def said(self) -> str:
        """The form that the rows were read in, and what was left out of them."""
        count = self.meta["report"]["rows"]
        names = [f"{name} ({n} rows)" if n < count else name for name, n in self.meta["left_out"].items()]
        return f"{self.path}: {self.meta['form']}" + (f"; left out: {', '.join(names)}" if names else "")

    def first_outside(self, rows: int) -> tuple[str, int] | None:
        """Return source and token id of the first example with an id of `rows` or more; None if there is none."""
        found: tuple[int, int] | None = None
        for start, batch in zip(self._starts, self._batches, strict=False):
            for name in ("prompt", *self.settings.responses):
                column = batch.column(name)
                at = np.flatnonzero(column.values.to_numpy() >= rows)[:1]
                if len(at):
                    row = int(np.searchsorted(column.offsets.to_numpy(), at[0], side="right")) - 1
                    found = min(found or (len(self), 0), (int(start) + row, int(column.values[int(at[0])].as_py())))
            if found:
                return self[found[0]].source, found[1]
        return None

    def _lengths(self, name: str) -> np.ndarray:
        lengths = [np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int32), *lengths])


@functools.lru_cache(maxsize=64)
def _content(path: Path, written: int) -> str:
    """Return the hash of a file's bytes; a process reads them once."""
    return damage_hash(path)


def _list_array(value: Any) -> np.ndarray:
    return value.values.to_numpy()


# ---- writing ----------------------------------------------------------------------------------------------------


def token_files(
    paths: Sequence[Path],
    tokenizer: Any,
    settings: TokenizationConfig,
    folder: Path,
    *,
    log: Callable[[str], None] = print,
) -> list[TokenFile]:
    """Return the tokenized files of `paths` from their cache folders in `folder`; tokenize files that are not cached.

    Raises:
        RowError: a row is invalid; nothing of its file is cached.
    """
    hf = getattr(tokenizer, "tokenizer", tokenizer)
    shared = {"tokenizer": tokenizer_hash(hf), "settings": asdict(settings), "version": VERSION}
    files = [_token_file(path, hf, settings, folder, shared, log) for path in paths]
    for file in files:
        log(file.said)
    return files


def _token_file(
    path: Path, hf: Any, settings: TokenizationConfig, folder: Path, shared: dict[str, Any], log: Callable[[str], None]
) -> TokenFile:
    hash_inputs = {"content": content_hash(path, folder), **shared}
    key = hashlib.sha256(json.dumps(hash_inputs, sort_keys=True).encode()).hexdigest()[:32]
    cached = folder / key
    file = _open_cached(cached, path, log)
    if file is not None:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / f"{key}.lock")
    lock.acquire(waiting=lambda owner: log(f"{path}: another process is tokenizing it{owner}; waiting for it to end"))
    try:
        file = _open_cached(cached, path, lambda _: None)
        if file is None:
            for stale in [cached, *folder.glob(f"{key}.*.partial")]:
                shutil.rmtree(stale, ignore_errors=True)
            with atomic_write(cached) as partial:
                partial.mkdir()
                _make(path, hf, settings, partial, hash_inputs)
            file = TokenFile(cached, str(path))
    finally:
        lock.release()
    return file


def _open_cached(cached: Path, path: Path, log: Callable[[str], None]) -> TokenFile | None:
    try:
        return TokenFile(cached, str(path)) if cached.exists() else None
    except (ValueError, OSError, KeyError, TypeError, pa.ArrowException) as error:
        log(f"{cached} is damaged ({error}) and will be made again")
        return None


@dataclass
class _Encoded:
    """Tokenized examples and counts of one chunk."""

    batch: bytes
    digests: bytes
    """Concatenated hashes of the examples."""
    examples: int
    report: TokenizationStats
    counts: FormatCounts


def _make(path: Path, hf: Any, settings: TokenizationConfig, folder: Path, hash_inputs: dict[str, Any]) -> None:
    report, counts, num_examples = TokenizationStats(settings.kind), FormatCounts(), 0
    digest = hashlib.sha256(json.dumps(hash_inputs["settings"]["kind"]).encode())
    with (
        pa.OSFile(str(folder / TOKENS), "wb") as file,
        pa.ipc.new_stream(file, _schema(settings)) as writer,
    ):
        reader = reader_of(path, settings.forms)
        make = functools.partial(_chunk_encoder, hf, settings, reader)
        for encoded in map_chunks(path, make, f"Tokens of {path.name}", reader=reader):
            report.merge(encoded.report)
            counts.merge(encoded.counts)
            num_examples += encoded.examples
            digest.update(encoded.digests)
            writer.write_batch(pa.ipc.read_record_batch(pa.py_buffer(encoded.batch), _schema(settings)))
    counts.check(path)
    report.add_dropped_rows(counts.dropped)
    meta = {
        "bytes": (folder / TOKENS).stat().st_size,
        "tokens": damage_hash(folder / TOKENS),
        "examples": num_examples,
        "fingerprint": digest.hexdigest(),
        "report": {**vars(report), "dropped": dict(report.dropped), "left": dict(report.left)},
        "form": reader.name,
        "left_out": dict(counts.left_out),
        **hash_inputs,
    }
    (folder / META).write_text(json.dumps(sealed(meta), indent=1))


def map_chunks(path: Path, make: Callable[[], Callable[[Chunk], Any]], title: str, *, reader: Reader) -> Any:
    """Yield `make()` of each chunk of a file, in order, with a progress bar; a large file uses all cores."""
    size = path.stat().st_size
    workers = min(process_pool.cores(), size // (4 * CHUNK))
    with tqdm(
        total=size, desc=title, unit="B", unit_scale=True, disable=size < CHUNK, leave=False, file=messages()
    ) as bar:
        for chunk, result in process_pool.ordered_map(
            make, chunks(path, together=reader.form.together), workers=workers
        ):
            bar.update(chunk.read - bar.n)
            yield result


def check_rows(path: Path, folder: Path, options: Options) -> None:
    """Check the rows of a file once, without a tokenizer; a marker in `folder` records the result.

    Raises:
        RowError: a row is invalid; the message contains the `file:line` of the first one.
    """
    setting = hashlib.sha256(repr(options).encode()).hexdigest()[:8]
    checked = folder / "files" / f"{content_hash(path, folder)}-{setting}-{VERSION}.good"
    checked.parent.mkdir(parents=True, exist_ok=True)
    with Lock(checked.with_name(f"{checked.name}.lock")):
        if checked.exists():
            return
        counts = FormatCounts()
        reader = reader_of(path, options)
        make = functools.partial(_chunk_counter, reader)
        for chunk_counts in map_chunks(path, make, f"Rows of {path.name}", reader=reader):
            counts.merge(chunk_counts)
        counts.check(path)
        checked.touch()


def _chunk_counter(reader: Reader) -> Callable[[Chunk], FormatCounts]:
    return lambda chunk: _parse_chunk(reader, chunk)[1]


def _parse_chunk(reader: Reader, chunk: Chunk) -> tuple[list[Row], FormatCounts]:
    counts = FormatCounts()
    return list(reader.rows(chunk.texts(), counts)), counts


def _chunk_encoder(hf: Any, settings: TokenizationConfig, reader: Reader) -> Callable[[Chunk], _Encoded]:
    encode = ResponseTokenizer(hf, apply_chat_template=settings.apply_chat_template, template=settings.template)

    def encoded(chunk: Chunk) -> _Encoded:
        rows, counts = _parse_chunk(reader, chunk)
        tokenized, report = examples(
            rows, encode, kind=settings.kind, seq_length=settings.seq_length, overlong=settings.overlong
        )
        batch = pa.record_batch(_columns(tokenized, settings), schema=_schema(settings))
        digests = b"".join(map(_digest, tokenized))
        return _Encoded(batch.serialize().to_pybytes(), digests, len(tokenized), report, counts)

    return encoded


def _schema(settings: TokenizationConfig) -> pa.Schema:
    names = ("prompt", *settings.responses, *(f"{UNSCORED}{name}" for name in settings.responses))
    tokens = [(name, pa.list_(pa.int32())) for name in names]
    numbers = [("chosen_reward", pa.float64()), ("rejected_reward", pa.float64()), ("desirable", pa.bool_())]
    return pa.schema([*tokens, *numbers, ("line", pa.int64()), ("prompt_hash", pa.int64())])


def _columns(rows: list[Example], settings: TokenizationConfig) -> list[pa.Array]:
    tokens = [[e.prompt for e in rows]]
    tokens += [[e.responses[k] for e in rows] for k in range(len(settings.responses))]
    tokens += [[e.unscored[k] if e.unscored else [] for e in rows] for k in range(len(settings.responses))]
    return [
        *(pa.array(column, pa.list_(pa.int32())) for column in tokens),
        pa.array([e.rewards[0] for e in rows], pa.float64()),
        pa.array([e.rewards[1] for e in rows], pa.float64()),
        pa.array([e.desirable for e in rows], pa.bool_()),
        pa.array([int(e.source.rpartition(":")[2]) for e in rows], pa.int64()),
        pa.array([short_hash(np.asarray(e.prompt, np.int32).tobytes()) for e in rows], pa.int64()),
    ]


def _digest(e: Example) -> bytes:
    """Return a hash of an example's content, independent of its position."""
    lengths = [len(e.prompt), *map(len, e.responses)]
    tokens = np.asarray([*lengths, *e.prompt, *(token for r in e.responses for token in r)], np.int32).tobytes()
    rest = repr((e.rewards, e.desirable, *([e.unscored] if e.unscored else [])))
    return hashlib.blake2b(tokens + rest.encode(), digest_size=16).digest()
