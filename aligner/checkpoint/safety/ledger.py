"""The checkpoints that a run wrote, by name: it removes no others, and notices when one of them is gone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from aligner.common import run_folder
from aligner.common.run_folder import read_lines

FILE = "checkpoints.jsonl"
"""File in the folder of provenance: a line for each change."""

State = Literal["partial", "complete", "removed"]
"""Being written or removed; complete; removed by the run itself."""


class Ledger:
    """The names of one run; only rank 0 writes."""

    def __init__(self, run: Path) -> None:
        self.path = run / run_folder.PROVENANCE / FILE

    def states(self) -> dict[str, State]:
        """Return the newest state of each name."""
        return {line["name"]: line["state"] for line in read_lines(self.path) if {"name", "state"} <= line.keys()}

    def named(self, state: State) -> list[str]:
        """Return the names in a state, in the order in which they came to it."""
        return [name for name, found in self.states().items() if found == state]

    def record(self, name: str, state: State) -> None:
        """Append a line, and flush it to the disk: what is written next must have its name here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps({"name": name, "state": state}) + "\n")
            file.flush()
            os.fsync(file.fileno())
