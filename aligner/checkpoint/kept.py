"""The checkpoints in a run's folder: which the run wrote, which it keeps, how one takes its place and goes."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from aligner.checkpoint import folders
from aligner.checkpoint.safety.ledger import Ledger, State
from aligner.common.console import log_rank0
from aligner.common.errors import CheckpointError
from aligner.common.files import PARTIAL, fsync_dir


class KeptCheckpoints:
    """Checkpoints of one run. Only rank 0 uses it; what the run did not write is not touched."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder, self.ledger = run, run / "checkpoints", Ledger(run)
        self._removals: list[threading.Thread] = []

    def claim(self, partial: Path) -> str | None:
        """Record the name of a checkpoint that is to be written; return what is there already and not of this run."""
        states = self.ledger.states()
        for path in (partial, partial.with_suffix("")):
            if (path.exists() or path.is_symlink()) and not _is_own(path, states):
                return str(path)
        self.ledger.record(partial.name, "partial")
        return None

    def put_in_place(self, partial: Path) -> Path:
        """Give a checkpoint that is complete its name; return its folder."""
        target = partial.with_suffix("")
        if target.exists():
            self._remove(target)  # damaged, of the same step, and passed over
        os.replace(partial, target)
        fsync_dir(target.parent)
        self.ledger.record(target.name, "complete")
        return target

    def link_last(self, target: Path) -> None:
        """Have the link `last` lead to a checkpoint."""
        last, link = target.with_name("last"), target.with_name(f"last{PARTIAL}")
        if last.exists() and not last.is_symlink():
            log_rank0(f"log.ckpt.save_last: {last} is no link of this run and stays as it is")
            return
        self.ledger.record(link.name, "partial")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, last)

    def prune(self, *, top_k: int, monitor: str | None, mode: str) -> None:
        """Remove the complete checkpoints that `steps_to_keep` does not name."""
        if top_k == -1:
            return
        checkpoints: list[tuple[int, float | None, Path]] = []
        states = self.ledger.states()
        for path in folders.folders(self.run):
            if _is_own(path, states) and not folders.is_unfinished(path) and folders.find_corruption(path) is None:
                try:
                    metadata = folders.metadata(path)
                except CheckpointError:
                    continue  # like a damaged one: not removed, and not counted among those to keep
                comparable = metadata.get("monitor") == monitor
                checkpoints.append((metadata["step"], metadata.get("value") if comparable else None, path))
        values = [(step, value) for step, value, _ in checkpoints]
        keep = steps_to_keep(values, top_k, mode, monitor is not None)
        for step, _, path in checkpoints:
            if step not in keep:
                self._remove(path)

    def clear_partial(self) -> None:
        """Remove what a killed job of this run left half-written or half-removed."""
        for name in self.ledger.named("partial"):
            path = self.folder / Path(name).name
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Wait until all removals are complete."""
        for removal in self._removals:
            removal.join()
        self._removals.clear()

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint: rename it now, delete its files in a thread."""
        doomed = path.with_name(f"{path.name}.{time.time_ns()}{PARTIAL}")
        self.ledger.record(doomed.name, "partial")
        self.ledger.record(path.name, "removed")
        os.replace(path, doomed)
        removal = threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True})
        removal.start()
        self._removals.append(removal)


def _is_own(path: Path, states: Mapping[str, State]) -> bool:
    """Return whether a run wrote a checkpoint where it is: copies, and what is linked, are somebody's."""
    return not path.is_symlink() and (path.name in states or f"{path.name}{PARTIAL}" in states)


def steps_to_keep(found: Sequence[tuple[int, float | None]], top_k: int, mode: str, monitored: bool) -> set[int]:
    """Return the steps to keep of (step, value): the newest, and the `top_k` best or, if not monitored, newest."""
    steps = sorted(step for step, _ in found)
    if top_k == -1:
        return set(steps)
    if not monitored:
        return set(steps[-max(1, top_k) :])
    measured = sorted((value if mode == "min" else -value, -step) for step, value in found if value is not None)
    return {steps[-1], *(-step for _, step in measured[:top_k])}
