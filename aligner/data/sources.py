"""Data files of a split: plain or compressed JSON lines, with optional weights.

    "pairs.jsonl"                               one file
    "data/"                                     every *.jsonl, *.jsonl.gz and *.jsonl.zst in the folder, by name
    ["a.jsonl", "b.jsonl.gz"]                   several files
    [0.7, "a.jsonl", 0.3, "b/"]                 a blend: shares of an epoch, in NeMo's notation

gzip and Zstandard compression is detected by the first bytes of a file. A byte-order mark and blank lines are skipped;
lines may end in CR LF.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.common.errors import ConfigError, RowError
from aligner.data.forms.form import Options
from aligner.data.forms.table import FORM_OF_NONE, Reader, check_options, recognize
from aligner.data.rows import FORMS

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")
CHUNK = 2 << 20
"""Bytes of text per chunk."""
LONGEST = 256 << 20
"""Maximum bytes of a line; a longer line indicates another file format."""


@dataclass(frozen=True)
class DataFile:
    """One file of a split."""

    path: Path
    weight: float | None = None
    """Share of an epoch, relative to the sum of weights; None: every row once."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive undecoded lines of a file."""

    path: str
    first: int
    """Line number of the first line."""
    lines: list[bytes]
    read: int
    """Bytes read from the file on disk, including this chunk."""

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield nonblank lines with their `file:line`.

        Raises:
            RowError: a line is not UTF-8.
        """
        for number, line in enumerate(self.lines, start=self.first):
            source = f"{self.path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RowError(
                    f"{source}: is not UTF-8 ({error.reason}, byte {error.start} of the line); save the file as UTF-8"
                ) from None
            if text.strip():
                yield text, source


def resolve_files(source: Any, field: str) -> list[DataFile]:
    """Return the files of `source`; `field` is the name of its argument.

    Raises:
        RowError: a file is missing, or a folder contains no data file.
        ConfigError: `source` has none of the forms above.
    """
    if isinstance(source, str | os.PathLike):
        return [DataFile(path) for path in _list_files(Path(source))]
    if not isinstance(source, Sequence) or not source:
        raise ConfigError(
            f"{field}: expected a file, a folder, or a list of them with or without weights; got {source!r}"
        )
    if not isinstance(source[0], int | float):
        files = [part for item in source for part in resolve_files(item, field)]
        if any(part.weight is not None for part in files):
            raise ConfigError(f"{field}: either every file has a weight before it or none has; found {list(source)}")
        return files
    weights, names = source[::2], source[1::2]
    alternating = len(weights) == len(names) and all(isinstance(name, str | os.PathLike) for name in names)
    if not alternating or not all(isinstance(w, int | float) and 0 < w < float("inf") for w in weights):
        raise ConfigError(
            f"{field}: weights and files must alternate, weights above 0, as [0.7, 'a.jsonl', 0.3, 'b.jsonl']; "
            f"found {list(source)}"
        )
    return [part for weight, name in zip(weights, names, strict=True) for part in _weighted(Path(name), float(weight))]


def _weighted(path: Path, weight: float) -> list[DataFile]:
    """Divide a folder's weight among its files in proportion to their sizes on disk."""
    files = _list_files(path)
    total = max(1, sum(file.stat().st_size for file in files))
    return [DataFile(file, weight * file.stat().st_size / total) for file in files]


def _list_files(path: Path) -> list[Path]:
    path = path.expanduser()
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.name.endswith(SUFFIXES) and file.is_file() and not file.name.startswith(".")
        )
        if not files:
            raise RowError(f"{path}: the folder holds no {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise RowError(f"{path}: no such file; expected JSON lines with {FORMS} (looked in {Path.cwd()})")
    return [path]


def reader_of(path: Path, options: Options, *, skip_bad: bool = False) -> Reader:
    """Return the reader of a file's rows, by its first line; with `skip_bad`, by the first that can be read.

    Raises:
        RowError: the file has no rows, or its first line is of no form.
    """
    check_options(options, "data.")
    for chunk in chunks(path):
        for text, source in chunk.texts():
            try:
                return recognize(text, source, options)
            except RowError:
                if not skip_bad:
                    raise
    if skip_bad:
        return Reader(FORM_OF_NONE, options)
    raise RowError(f"{path}: holds no rows; expected one a line, with {FORMS}")


def chunks(path: Path, *, together: str | None = None) -> Iterator[Chunk]:
    """Yield the lines of a file in chunks of about `CHUNK` bytes; chunk limits are the same for all readers.

    Consecutive lines with the same value under the key `together` are in one chunk.

    Raises:
        RowError: the compressed file is truncated or damaged, or a line has `LONGEST` bytes.
    """
    with path.open("rb") as raw:
        lines: list[bytes] = []
        size, first = 0, 1
        for number, line in enumerate(_lines(path, raw), start=1):
            if size >= CHUNK and not (together and _same(lines[-1], line, together)):
                yield Chunk(str(path), first, lines, raw.tell())
                lines, size, first = [], 0, number
            lines.append(line)
            size += len(line)
        if lines:
            yield Chunk(str(path), first, lines, path.stat().st_size)


def _same(one: bytes, other: bytes, key: str) -> bool:
    try:
        return json.loads(one).get(key) == json.loads(other).get(key)
    except (ValueError, AttributeError):
        return False  # told when the line is read


def _lines(path: Path, raw: Any) -> Iterator[bytes]:
    text, number = _decompress(raw), 0
    while True:
        try:
            # Split at line feeds only: str.splitlines also splits at U+2028, which JSON allows inside a string.
            line = text.readline(LONGEST)
        except (OSError, EOFError, zlib.error) as error:
            raise RowError(
                f"{path}:{number + 1}: the compressed file breaks off or is damaged here ({error}); copy it again"
            ) from None
        if not line:
            return
        number += 1
        if len(line) == LONGEST:
            raise RowError(f"{path}:{number}: is longer than {LONGEST >> 20} MiB; is this a file of JSON lines?")
        yield line


def _decompress(raw: Any) -> Any:
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    if magic == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
    return raw
