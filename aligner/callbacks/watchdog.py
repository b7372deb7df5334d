"""When nothing moves any more: which rank is behind the others, and what each waits for.

Every rank has a thread that looks at the time of its last progress. When it has been too long, the rank writes where it
stands into `hang/` of the run; the first rank that still can reads what all wrote and says it. Nothing is exchanged
while all is well, and nothing that could itself hang is asked of torch.distributed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.model.scoring import SCORING

ORDER = (
    "logging",
    "saving",
    "validation",
    "waits for its batch",
    "scoring",
    "forward and backward",
    "optimizer step",
)
"""Phases, in the order in which they come while so many steps have been made."""


class Watchdog(pl.Callback):
    """Says which rank hangs, and where."""

    def __init__(self, run: Path, *, hang_timeout_s: float) -> None:
        self.folder, self.hang_timeout_s = run / "hang", hang_timeout_s
        self.rank, self.ranks = 0, 1
        self._at: tuple[float, int, str] = (time.monotonic(), 0, ORDER[0])
        self._ends = threading.Event()
        self._main = threading.main_thread().ident

    # ---- progress ---------------------------------------------------------------------------------------------

    def _reach(self, trainer: pl.Trainer, phase: str) -> None:
        self._at = (time.monotonic(), trainer.global_step, phase)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rank, self.ranks, self._main = trainer.global_rank, trainer.world_size, threading.get_ident()
        self._reach(trainer, ORDER[0])
        self._file.unlink(missing_ok=True)  # of a job before this one
        if self.hang_timeout_s:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach(trainer, "waits for its batch")

    def on_megatron_microbatches_start(self, step: Any) -> None:
        phase = "validation" if step.forward_only else "forward and backward"
        self._reach(step.trainer, "scoring" if step.step_i == SCORING else phase)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach(trainer, "optimizer step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach(trainer, "logging")

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reach(trainer, "saving")

    def teardown(self, *_: Any, **__: Any) -> None:
        self._ends.set()

    def on_exception(self, *_: Any) -> None:
        self._ends.set()

    # ---- the other thread -------------------------------------------------------------------------------------

    def _look(self) -> None:
        told = 0.0
        while not self._ends.wait(min(1.0, self.hang_timeout_s / 4)):
            since, step, phase = self._at
            if told and since != told:
                self._file.unlink(missing_ok=True)
                told = 0.0
            if time.monotonic() - since < self.hang_timeout_s or since == told:
                continue
            told = since
            with contextlib.suppress(OSError):  # a full disk is said by what needs it
                self._write(step, phase, time.monotonic() - since)
            # The others notice within a moment; a rank that has stopped never does.
            if not self._ends.wait(min(5.0, self.hang_timeout_s)) and self._at[0] == since:
                self._tell()

    def _write(self, step: int, phase: str, seconds: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame)[-12:] if frame else []
        self.folder.mkdir(parents=True, exist_ok=True)
        said = {
            "rank": self.rank,
            "step": step,
            "phase": phase,
            "seconds": round(seconds, 1),
            "written": time.time(),
            "stack": [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in reversed(stack)],
        }
        with atomic_write(self._file) as partial:
            partial.write_text(json.dumps(said, indent=2) + "\n")

    @property
    def _file(self) -> Path:
        return self.folder / f"rank-{self.rank:05d}.json"

    def _tell(self) -> None:
        found = []
        for path in sorted(self.folder.glob("rank-*.json")):
            with contextlib.suppress(OSError):  # taken away by a rank that moves again
                said = json.loads(path.read_text())
                if time.time() - said["written"] < 2 * self.hang_timeout_s + 10:
                    found.append(said)
        if found and found[0]["rank"] == self.rank:
            # Not by `log_rank0`, which is for rank 0 alone: it may be the one that is gone.
            message = report(found, self.ranks, folder=self.folder)
            log_rank0(message) if self.rank == 0 else print(f"[align] {message}", file=sys.stderr, flush=True)


def report(found: list[dict[str, Any]], ranks: int, *, folder: Path) -> str:
    """What the ranks wrote, in one message that begins with the one that holds the others up."""
    silent = sorted(set(range(ranks)) - {said["rank"] for said in found})
    found = sorted(found, key=lambda said: (said["step"], ORDER.index(said["phase"]), said["rank"]))
    behind = [s for s in found if (s["step"], s["phase"]) == (found[0]["step"], found[0]["phase"])]
    if silent:
        named = ", ".join(map(str, silent[:16]))
        culprit = f"rank {named} says nothing: stopped, ended, or its machine is gone"
    elif len(behind) < len(found):
        culprit = f"rank {', '.join(str(said['rank']) for said in behind[:16])} is behind the others"
    else:
        culprit = "all ranks are at the same place"
    lines = [f"no progress for {max(said['seconds'] for said in found):.0f} s; {culprit} ({folder}):"]
    for said in found[:16]:
        lines.append(f"  rank {said['rank']}: step {said['step']}, {said['phase']}: {' < '.join(said['stack'][:4])}")
    return "\n".join(lines)


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
