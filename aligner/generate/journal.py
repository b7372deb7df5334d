"""Rows that take long to make: appended as they come, never twice, never torn, and in order when all are there.

While `generate.jsonl` is made there is a folder `generate.jsonl.parts` beside it: what the rows are made of
(`settings.json`), and a file for each process that makes some. A job that is killed loses the rows it was about to
write, and no other. When the last row is there, all are put in order under the final name and the folder goes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from aligner.common.errors import ConfigError, RowError
from aligner.common.files import PARTIAL, atomic_write

JsonObject = dict[str, Any]


class Journal:
    """The rows of one file.

    `settings` say what they are made of, the content of files as hashes under `of`; others than those it was begun with
    are refused.
    """

    def __init__(self, path: Path, settings: JsonObject) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.parts = path.with_name(f"{path.name}.parts")
        self.made_with = path.with_name(f"{path.name}.settings.json")

    def check_finished(self) -> bool:
        """Whether all rows are there; a file of which nothing says what it was made of is somebody's own.

        Raises:
            ConfigError: they are, and were made of something else.
        """
        if not self.path.exists():
            return False
        if self.made_with.exists():
            self._compare(self.made_with)
        return True

    def begin(self) -> None:
        """Make ready to append; one process does, before the others read.

        Raises:
            ConfigError: the rows so far were made of something else, or another job makes them.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        # The system lets go of it when the process ends, however it ends.
        self._lock = filelock.FileLock(self.parts / ".lock", timeout=0, is_singleton=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise ConfigError(f"output: another job is at work on {self.path}; wait for it, or name another") from None
        note = self.parts / "settings.json"
        if note.exists():
            self._compare(note)
        else:
            with atomic_write(note) as partial:
                partial.write_text(json.dumps(self.settings, indent=1))
        for part in self._files():
            content = part.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # a job ended in the middle of a line
                with part.open("r+b") as file:
                    file.truncate(whole)

    def rows(self) -> list[JsonObject]:
        """All so far, in no order."""
        return [row for part in self._files() for row in read(part)]

    def appending(self, part: int) -> IO[bytes]:
        """The file that process number `part` appends to, by `append`."""
        return (self.parts / f"{part:05d}.jsonl").open("ab")

    def finish(self, place: Callable[[JsonObject], Any]) -> None:
        """Put all rows under the final name, sorted by `place`; one process does, when all have written theirs."""
        rows = sorted(self.rows(), key=place)
        with atomic_write(self.made_with) as partial:
            shutil.copyfile(self.parts / "settings.json", partial)
        write(self.path, rows)
        self._lock.release(force=True)
        # First out of sight: what is left of a removal must not be taken for a beginning.
        gone = self.parts.with_name(f"{self.parts.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        self.parts.rename(gone)
        shutil.rmtree(gone)

    def write_all(self, rows: Iterable[JsonObject]) -> None:
        """All rows at once, where they take no time."""
        with atomic_write(self.made_with) as partial:
            partial.write_text(json.dumps(self.settings, indent=1))
        write(self.path, rows)

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("*.jsonl"))

    def _compare(self, note: Path) -> None:
        try:
            held = json.loads(note.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: {note} cannot be read ({error}); remove it with {self.path}") from None
        others = [name for name, known in self.settings.get("of", {}).items() if held.get("of", {}).get(name) != known]
        if others:
            raise ConfigError(
                f"{self.path}: was made of other {' and '.join(others)}; remove it to make it anew, or put back what "
                "they were"
            )
        for name in sorted(held.keys() | self.settings.keys()):
            if held.get(name) != self.settings.get(name):
                raise ConfigError(
                    f"{name}: is {self.settings.get(name)!r}, but {self.path} was begun with {held.get(name)!r}; set "
                    "it back, or name another output"
                )


def append(file: IO[bytes], row: JsonObject) -> None:
    """Write a row so that it survives a kill, and a loss of power."""
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def write(path: Path, rows: Iterable[JsonObject]) -> None:
    """A whole file of rows, or none."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, needed: Iterable[str] = ()) -> Iterator[JsonObject]:
    """The rows of a file that this package wrote, or somebody in its place, each with what is needed of it.

    Raises:
        RowError: a line is not one.
    """
    if not path.is_file():
        raise RowError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RowError(f"{path}:{number}: is not JSON ({error}); remove the line, or the file") from None
            if not isinstance(row, dict):
                raise RowError(f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            for name in needed:
                if name not in row:
                    raise RowError(f"{path}:{number}: has no {name!r}; found the keys {', '.join(map(repr, row))}")
            yield row
