"""Resumable JSON-lines output: rows are appended one by one, written once, and sorted at the end.

While `generate.jsonl` is incomplete, a folder `generate.jsonl.parts` beside it contains the settings of the rows
(`settings.json`) and one file per writing process. A killed job loses only the rows that it had not yet written. After
the last row, all rows are sorted into the final file, and the folder is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from aligner.common import secrets_filter
from aligner.common.errors import ConfigError, RowError
from aligner.common.files import PARTIAL, atomic_write
from aligner.common.locking import Busy, Lock

JsonObject = dict[str, Any]


class Journal:
    """The rows of one file.

    `settings` are what the rows depend on; hashes of input files are under `of`. A journal that was begun with other
    settings is refused.
    """

    def __init__(self, path: Path, settings: JsonObject) -> None:
        self.path, self.settings = path, secrets_filter.hidden_in(json.loads(json.dumps(settings)))
        self.parts = path.with_name(f"{path.name}.parts")
        self.made_with = path.with_name(f"{path.name}.settings.json")
        self._lock = Lock(self.parts / ".lock")

    def check_finished(self) -> bool:
        """Return whether the file is complete. A file without a settings file is a user's own and counts as complete.

        Raises:
            ConfigError: the file is complete, but was made with other settings.
        """
        if not self.path.exists():
            return False
        if self.made_with.exists():
            self._compare(self.made_with)
        return True

    def begin(self) -> None:
        """Prepare the folder for appending. One process calls `begin` before the others read.

        Raises:
            ConfigError: the rows so far were made with other settings, or another job is writing them.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(waiting=None)
        except Busy as owner:
            raise ConfigError(
                f"output: another job is at work on {self.path}{owner}; wait for it, or name another"
            ) from None
        try:
            if self.path.exists():
                raise ConfigError(f"output: another job has just finished {self.path}; run the same again")
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        settings_file = self.parts / "settings.json"
        if settings_file.exists():
            self._compare(settings_file)
        else:
            with atomic_write(settings_file) as partial:
                partial.write_text(json.dumps(self.settings, indent=1))
        for part in self._files():
            content = part.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):  # a job was killed in the middle of a line
                with part.open("r+b") as file:
                    file.truncate(end)

    def rows(self, keys: Collection[str], fields: Iterable[str] = ()) -> list[JsonObject]:
        """Return all rows so far, in no particular order.

        Args:
            keys: the keys that rows may have.
            fields: what each row must have beside its key.

        Raises:
            RowError: a line is not a row of this journal, or its key occurs twice.
        """
        found: dict[str, JsonObject] = {}
        first: dict[str, str] = {}
        for part in self._files():
            for number, row in enumerate(read(part, ("key", *fields)), start=1):
                key, where = row["key"], f"{part}:{number}"
                if key in first:
                    raise RowError(f"{where}: has the key {key!r} of {first[key]}; remove one of the two lines")
                if not isinstance(key, str) or key not in keys:
                    raise RowError(f"{where}: has the key {key!r}, which no request of this job has; remove the line")
                found[key], first[key] = row, where
        return list(found.values())

    def open_part(self, part: int) -> IO[bytes]:
        """Open the file of process number `part`, for `append`."""
        return (self.parts / f"{part:05d}.jsonl").open("ab")

    def finish(self, rows: Iterable[JsonObject]) -> None:
        """Write the final file of all rows, in order. One process calls `finish` after all have written."""
        with atomic_write(self.made_with) as partial:
            shutil.copyfile(self.parts / "settings.json", partial)
        write(self.path, rows)
        self.close()
        # Rename before removing: a partly removed folder must not look like an unfinished journal.
        trash = self.parts.with_name(f"{self.parts.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        self.parts.rename(trash)
        shutil.rmtree(trash)

    def close(self) -> None:
        """Let other jobs go on with the journal."""
        self._lock.release()

    def write_all(self, rows: Iterable[JsonObject]) -> None:
        """Write all rows at once, without a folder of parts."""
        with atomic_write(self.made_with) as partial:
            partial.write_text(json.dumps(self.settings, indent=1))
        write(self.path, rows)

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("*.jsonl"))

    def _compare(self, settings_file: Path) -> None:
        try:
            recorded = json.loads(settings_file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: {settings_file} cannot be read ({error}); remove it with {self.path}") from None
        changed = [
            name
            for name, content_hash in self.settings.get("of", {}).items()
            if recorded.get("of", {}).get(name) != content_hash
        ]
        if changed:
            raise ConfigError(
                f"{self.path}: was made of other {' and '.join(changed)}; remove it to make it anew, or put back what "
                "they were"
            )
        for name in sorted(recorded.keys() | self.settings.keys()):
            if recorded.get(name) != self.settings.get(name):
                raise ConfigError(
                    f"{name}: is {self.settings.get(name)!r}, but {self.path} was begun with {recorded.get(name)!r}; "
                    "set it back, or name another output"
                )


def append(file: IO[bytes], row: JsonObject) -> None:
    """Write a row and sync it to disk: it survives a kill and a power loss."""
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def write(path: Path, rows: Iterable[JsonObject]) -> None:
    """Write a file of rows atomically."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, needed: Iterable[str] = ()) -> Iterator[JsonObject]:
    """Yield the rows of a JSON-lines file; check that each has the keys `needed`.

    Raises:
        RowError: the file is missing, or a line is not a JSON object with these keys.
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
