"""Data files of a split, with optional weights.

    "pairs.jsonl"                               a file: JSON lines, a JSON array, Parquet, Arrow, CSV; compressed or not
    "data/"                                     every such file of a folder, by name; or what `datasets` saved there
    "data/part-*.parquet"                       the files that match, by name
    "hf://datasets/NAME[:CONFIG][:SPLIT]"       a data set of the hub, by the `datasets` library
    ["a.jsonl", "b.jsonl.gz"]                   several of these
    [0.7, "a.jsonl", 0.3, "b/"]                 a blend: shares of an epoch, in NeMo's notation

A byte-order mark and blank lines are skipped; lines may end in CR LF. Hidden files of a folder are no data.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.common import containers
from aligner.common.containers import DESCRIPTIONS, SUFFIXES
from aligner.common.errors import ConfigError, RowError
from aligner.data.forms.form import Options
from aligner.data.forms.table import FORM_OF_NONE, Reader, check_options, recognize
from aligner.data.rows import FORMS, FormatCounts, Row

PLAIN = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv")
CHUNK = 2 << 20
"""Bytes of text per chunk."""


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
        return [DataFile(path) for path in _list_files(source)]
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
    return [part for weight, name in zip(weights, names, strict=True) for part in _weighted(name, float(weight))]


def by_name(source: Any, field: str) -> dict[str, list[DataFile]]:
    """Return the files of sets by name, as {"easy": "a.jsonl"}; of a single one under the empty name.

    Raises:
        ConfigError: a name has other characters than letters, digits, dots, dashes and underscores.
        RowError: see `resolve_files`.
    """
    if not isinstance(source, dict):
        return {"": resolve_files(source, field)}
    for name in source:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"{field}: {name!r} is no name of a set; use letters, digits, dots and dashes")
    if not source:
        raise ConfigError(f"{field}: is empty; name a set, or leave it out")
    return {name: resolve_files(part, f"{field}[{name!r}]") for name, part in source.items()}


def _weighted(name: str | os.PathLike[str], weight: float) -> list[DataFile]:
    """Divide a folder's weight among its files in proportion to their sizes on disk."""
    files = _list_files(name)
    total = max(1, sum(file.stat().st_size for file in files))
    return [DataFile(file, weight * file.stat().st_size / total) for file in files]


def _list_files(name: str | os.PathLike[str]) -> list[Path]:
    text = os.fspath(name)
    if text.startswith(("hf://", "hf:/")):
        return _of_the_hub(text)
    if "://" in text:
        raise RowError(f"{text}: is an address, and data are files; download it, or use hf://datasets/NAME of the hub")
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if glob.has_magic(text) else []
        files = [match for match in found if match.is_file() and not match.name.startswith(".")]
        if not files:
            raise RowError(f"{path}: no such file; expected JSON lines with {FORMS} (looked in {Path.cwd()})")
        return files
    return [path]


def _in_folder(folder: Path) -> list[Path]:
    """Return the data files of a folder, or those of a data set that `datasets` saved there."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if len(splits) > 1:
            shown = ", ".join(str(folder / split) for split in splits)
            raise RowError(f"{folder}: holds several splits; give one of {shown}")
        return _in_folder(folder / splits[0])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text())
        if state.get("_indices_files"):
            raise RowError(f"{folder}: is a selection of rows; save it anew after flatten_indices()")
        return [folder / file["filename"] for file in state["_data_files"]]
    files = sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith(SUFFIXES) and file.is_file() and not file.name.startswith(".")
        if file.name not in DESCRIPTIONS
    )
    if not files:
        raise RowError(f"{folder}: the folder holds no file of rows ({', '.join(PLAIN)}, compressed or not)")
    return files


def _of_the_hub(name: str) -> list[Path]:
    """Return the files of a data set of the hub, which `datasets` downloads once.

    Raises:
        RowError: there is no such data set, or no network.
    """
    if not name.startswith("hf://datasets/"):
        raise RowError(
            f"{name}: expected hf://datasets/NAME, or hf://datasets/NAME:SPLIT, or hf://datasets/NAME:CONFIG:SPLIT"
        )
    if "[" in name or "+" in name:
        raise RowError(f"{name}: expected the name of one split, not a part of it or a sum")
    repository, *parts = name.removeprefix("hf://datasets/").split(":")
    split, config = (parts[-1] if parts else "train"), (parts[0] if len(parts) > 1 else None)
    import datasets

    try:
        data: Any = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # of whatever library it loads by
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RowError(
            f"{name}: cannot be had from the hub ({type(error).__name__}: {first[:300]}); without a network, give files"
        ) from None
    files = [Path(file["filename"]) for file in data.cache_files]
    if not files:
        raise RowError(f"{name}: holds no rows")
    return files


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


def rows(path: Path, reader: Reader, counts: FormatCounts) -> Iterator[Row]:
    """Yield the rows of a file, and count them; `counts.check` tells what they lack at the end.

    Raises:
        RowError: a row cannot be read.
    """
    for chunk in chunks(path, together=reader.form.together):
        yield from reader.rows(chunk.texts(), counts)


def preview(path: Path, options: Options) -> str:
    """Return the form of a file and the columns that are left out, after a look at its first hundred rows.

    Raises:
        RowError: one of them cannot be read.
    """
    reader, counts = reader_of(path, options), FormatCounts()
    for chunk in chunks(path, together=reader.form.together):
        for _ in reader.rows(itertools.islice(chunk.texts(), 100), counts):
            pass
        break
    left_out = ", ".join(counts.left_out)
    return f"{path}: {reader.name}" + (f"; left out: {left_out}" if left_out else "")


def chunks(path: Path, *, together: str | None = None) -> Iterator[Chunk]:
    """Yield the lines of a file in chunks of about `CHUNK` bytes; chunk limits are the same for all readers.

    Consecutive lines with the same value under the key `together` are in one chunk.

    Raises:
        RowError: the file is truncated or damaged, or of no known kind.
    """
    with path.open("rb") as raw:
        lines: list[bytes] = []
        size, first = 0, 1
        rows, tell = containers.read_lines(path, raw)
        for number, line in enumerate(rows, start=1):
            if size >= CHUNK and not (together and _same(lines[-1], line, together)):
                yield Chunk(str(path), first, lines, tell())
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
