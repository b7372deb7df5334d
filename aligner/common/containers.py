"""Rows of a file as JSON lines, whatever holds them: JSON lines, a JSON array, Parquet, Arrow, CSV; compressed or not.

What a file is shows in its first bytes, not in its name; only CSV is known by its name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aligner.common.errors import RowError

PACKED = ("", ".gz", ".zst", ".zstd", ".bz2", ".xz")
TEXTS = tuple(kind + packed for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in PACKED)
SUFFIXES = (*TEXTS, ".parquet", ".arrow")
"""Ends of names of the files of a folder that are read."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of a folder that describe others."""
LONGEST = 256 << 20
"""Maximum bytes of a line; a longer line indicates another file format."""
ARRAY = 4 << 30
"""Maximum bytes of a JSON array, which is read as a whole."""
ARCHIVES = {"a zip archive": b"PK\x03\x04", "a 7-Zip archive": b"7z\xbc\xaf\x27\x1c", "a PDF": b"%PDF"}
BATCH = 1000
"""Rows of a table that are decoded at a time."""
KNOWN = "JSON lines, a JSON array, Parquet, Arrow or CSV, plain or compressed by gzip, zstd, bzip2 or xz"


def read_lines(path: Path, raw: BinaryIO) -> tuple[Iterator[bytes], Callable[[], int]]:
    """Return the rows of an open file as JSON lines, and a function that tells how many of its bytes are read.

    Raises:
        RowError: the file is damaged, or none of the known kinds; raised when its rows are read.
    """
    magic = _peek(raw, 8)
    if magic[:4] == b"PAR1":
        return _table(path, raw, _parquet)
    if magic[:6] == b"ARROW1" or magic[:4] == b"\xff\xff\xff\xff":
        return _table(path, raw, _arrow)
    text = _decompressed(path, raw, magic)
    return _guarded(path, _text_lines(path, text)), raw.tell


def _peek(raw: Any, count: int) -> bytes:
    return raw.peek(count)[:count]


def _decompressed(path: Path, raw: BinaryIO, magic: bytes) -> Any:
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    if magic[:4] == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
    if magic[:3] == b"BZh":
        return io.BufferedReader(bz2.BZ2File(raw))  # type: ignore[arg-type]
    if magic[:6] == b"\xfd7zXZ\x00":
        return io.BufferedReader(lzma.LZMAFile(raw))  # type: ignore[arg-type]
    for name, begin in (
        ("a zip archive", b"PK\x03\x04"),
        ("a 7-Zip archive", b"7z\xbc\xaf\x27\x1c"),
        ("a PDF", b"%PDF"),
    ):
        if magic.startswith(begin):
            raise RowError(f"{path}: is {name}; unpack it, or save its rows as {KNOWN}")
    return raw


def _text_lines(path: Path, text: Any) -> Iterator[bytes]:
    if _kind(path) in (".csv", ".tsv"):
        yield from _csv(path, text)
        return
    first = blank = text.readline(LONGEST)
    while blank and not blank.strip():
        blank = text.readline(LONGEST)
        first += blank
    if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and not _is_whole(first):
        yield from _array(path, first + text.read(ARRAY))
        return
    lines = itertools.chain([first] if first else [], iter(lambda: text.readline(LONGEST), b""))
    # Split at line feeds only: str.splitlines also splits at U+2028, which JSON allows inside a string.
    for number, line in enumerate(lines, start=1):
        if len(line) == LONGEST:
            raise RowError(f"{path}:{number}: is longer than {LONGEST >> 20} MiB; is this a file of JSON lines?")
        yield line


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    return suffixes[-1] if suffixes else ""


def _is_whole(line: bytes) -> bool:
    """Return whether a line that begins with a bracket is an array of something else than rows."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return not value or not all(isinstance(item, dict) for item in value)


def _array(path: Path, content: bytes) -> Iterator[bytes]:
    if len(content) >= ARRAY:
        raise RowError(f"{path}: is a JSON array over {ARRAY >> 30} GiB; write one object a line (jq -c '.[]')")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError(f"{path}:1: is not UTF-8 ({error.reason}, byte {error.start}); save the file as UTF-8") from None
    except ValueError as error:
        raise RowError(f"{path}: begins as a JSON array and is none ({error}); copy it again, or repair it") from None
    for row in rows:
        yield json.dumps(row).encode()


def _csv(path: Path, text: Any) -> Iterator[bytes]:
    """Yield the rows of a table with a header; a cell with JSON messages is read as these."""
    csv.field_size_limit(LONGEST)
    reader = csv.DictReader(
        io.TextIOWrapper(text, encoding="utf-8-sig", newline=""), delimiter="\t" if _kind(path) == ".tsv" else ","
    )
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise RowError(
                    f"{path}:{number}: row {number} has {'more' if None in row else 'fewer'} cells than the header "
                    f"({', '.join(reader.fieldnames or ())})"
                )
            yield json.dumps({key: _cell(value) for key, value in row.items()}).encode()
    except (csv.Error, UnicodeDecodeError) as error:
        raise RowError(f"{path}:{reader.line_num}: is not a table in CSV and UTF-8 ({error})") from None


def _cell(value: str) -> Any:
    if re.match(r"\s*\[?\s*\{", value):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        items = found if isinstance(found, list) else [found]
        return found if all(isinstance(item, dict) and "role" in item for item in items) else value
    return value or None


def _table(
    path: Path, raw: BinaryIO, batches: Callable[[Any], Iterator[Any]]
) -> tuple[Iterator[bytes], Callable[[], int]]:
    import pyarrow

    size, done = path.stat().st_size, [0, 1]

    def rows() -> Iterator[bytes]:
        try:
            for batch in batches(raw):
                for row in batch.to_pylist():
                    done[0] += 1
                    yield json.dumps({key: _without_nulls(value) for key, value in row.items()}, default=str).encode()
        except (pyarrow.ArrowException, OSError) as error:
            first = str(error).splitlines()[0]
            raise RowError(f"{path}: the table breaks off or is damaged ({first}); copy it again") from None

    return rows(), lambda: min(size, done[0] * 200)


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that a table fills in with null, since all of its structures have the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet(raw: Any) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=BATCH)


def _arrow(raw: Any) -> Iterator[Any]:
    import pyarrow

    if _peek(raw, 6) == b"ARROW1":
        file = pyarrow.ipc.open_file(raw)
        batches: Iterator[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(raw))
    for batch in batches:
        for begin in range(0, batch.num_rows, BATCH):
            yield batch.slice(begin, BATCH)


def _guarded(path: Path, lines: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines; damage of the compression is told with the line at which it is met."""
    number = 0
    while True:
        try:
            line = next(lines, None)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise RowError(
                f"{path}:{number + 1}: the compressed file breaks off or is damaged here ({error}); copy it again"
            ) from None
        if line is None:
            return
        number += 1
        yield line
