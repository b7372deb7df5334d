"""Hang detection: lagging ranks, their phases and their stacks.

A thread of every rank checks the time of the rank's last progress. After the timeout, the rank writes its step, phase
and stack to `hang/` of the run. The first rank that still can reports the files of all ranks. Without a hang, ranks
exchange nothing; with one, nothing calls torch.distributed, which could itself hang.
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

from aligner.common.console import log, log_rank0
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
"""Phases in the order in which they follow each other at the same `trainer.global_step`."""


class Watchdog(pl.Callback):
    """Callback that reports which rank hangs, and where."""

    def __init__(self, run: Path, *, hang_timeout_s: float) -> None:
        self.folder, self.hang_timeout_s = run / "hang", hang_timeout_s
        self.rank, self.ranks = 0, 1
        self._progress: tuple[float, int, str] = (time.monotonic(), 0, ORDER[0])
        """Time, step and phase of the last progress."""
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident

    # ---- progress ---------------------------------------------------------------------------------------------

    def _reach(self, trainer: pl.Trainer, phase: str) -> None:
        self._progress = (time.monotonic(), trainer.global_step, phase)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rank, self.ranks, self._main = trainer.global_rank, trainer.world_size, threading.get_ident()
        self._reach(trainer, ORDER[0])
        self._file.unlink(missing_ok=True)  # of an earlier job
        if self.hang_timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

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
        self._stopped.set()

    def on_exception(self, *_: Any) -> None:
        self._stopped.set()

    # ---- the watching thread ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        reported = 0.0
        while not self._stopped.wait(min(1.0, self.hang_timeout_s / 4)):
            since, step, phase = self._progress
            if reported and since != reported:
                self._file.unlink(missing_ok=True)
                reported = 0.0
            if time.monotonic() - since < self.hang_timeout_s or since == reported:
                continue
            reported = since
            with contextlib.suppress(OSError):  # a full disk is reported by the code that needs it
                self._write_state(step, phase, time.monotonic() - since)
            # The other ranks notice within a moment; a rank that has stopped never does.
            if not self._stopped.wait(min(5.0, self.hang_timeout_s)) and self._progress[0] == since:
                self._report_hang()

    def _write_state(self, step: int, phase: str, seconds: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame)[-12:] if frame else []
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "rank": self.rank,
            "step": step,
            "phase": phase,
            "seconds": round(seconds, 1),
            "written": time.time(),
            "stack": [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in reversed(stack)],
        }
        with atomic_write(self._file) as partial:
            partial.write_text(json.dumps(state, indent=2) + "\n")

    @property
    def _file(self) -> Path:
        return self.folder / f"rank-{self.rank:05d}.json"

    def _report_hang(self) -> None:
        states = []
        for path in sorted(self.folder.glob("rank-*.json")):
            with contextlib.suppress(OSError):  # removed by a rank that made progress
                state = json.loads(path.read_text())
                if time.time() - state["written"] < 2 * self.hang_timeout_s + 10:
                    states.append(state)
        if states and states[0]["rank"] == self.rank:
            # `log_rank0` logs on rank 0 alone, which may be the rank that is gone.
            message = report(states, self.ranks, folder=self.folder)
            log_rank0(message) if self.rank == 0 else log(message)


def report(found: list[dict[str, Any]], ranks: int, *, folder: Path) -> str:
    """Format the states of the ranks as one message, the lagging ranks first."""
    silent = sorted(set(range(ranks)) - {state["rank"] for state in found})
    found = sorted(found, key=lambda state: (state["step"], ORDER.index(state["phase"]), state["rank"]))
    behind = [s for s in found if (s["step"], s["phase"]) == (found[0]["step"], found[0]["phase"])]
    if silent:
        named = ", ".join(map(str, silent[:16]))
        culprit = f"rank {named} says nothing: stopped, ended, or its machine is gone"
    elif len(behind) < len(found):
        culprit = f"rank {', '.join(str(state['rank']) for state in behind[:16])} is behind the others"
    else:
        culprit = "all ranks are at the same place"
    lines = [f"no progress for {max(state['seconds'] for state in found):.0f} s; {culprit} ({folder}):"]
    for s in found[:16]:
        lines.append(f"  rank {s['rank']}: step {s['step']}, {s['phase']}: {' < '.join(s['stack'][:4])}")
    return "\n".join(lines)


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
