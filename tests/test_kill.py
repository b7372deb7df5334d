"""A run killed by SIGKILL, after a checkpoint and in the middle of writing one, and run again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aligner import checkpoints
from aligner.watching import read_metrics

STEPS = 60
COMMAND = [
    str(Path(sys.executable).parent / "nemo"), "llm", "align", "--factory", "tiny_dpo", "-y", "resume.start_from=None",
    f"trainer.max_steps={STEPS}", "log.ckpt.every_n_train_steps=10", "trainer.val_check_interval=20",
    "data.global_batch_size=8", "data.micro_batch_size=8", "model.config.num_layers=2",
]  # fmt: skip


def kill_when(ready: Callable[[Path], bool], cwd: Path) -> None:
    """Start the run, kill it with all its processes as soon as `ready` says so."""
    process = subprocess.Popen(
        COMMAND, cwd=cwd, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder, deadline = cwd / "runs/tiny_dpo/checkpoints", time.monotonic() + 150
    while not ready(folder):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def whole(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step=*") if path.is_dir() and not checkpoints.is_unfinished(path)]


def writing(folder: Path) -> bool:
    """A second checkpoint has begun: its marker stands, the first one is whole."""
    return bool(whole(folder)) and any(folder.glob("step=20-unfinished"))


@pytest.mark.parametrize(
    "ready", [lambda folder: bool(whole(folder)), writing], ids=["after a checkpoint", "while writing one"]
)
def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path, ready: Callable[[Path], bool]) -> None:
    kill_when(ready, tmp_path)
    run = tmp_path / "runs/tiny_dpo"
    left = checkpoints.newest(run)
    assert left is not None
    step = checkpoints.step_of(left)
    assert 10 <= step < STEPS

    again = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"goes on from step {step}" in again.stderr
    assert f"step {STEPS}" in again.stdout
    trained = [row["step"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert trained == list(range(STEPS))
    assert checkpoints.step_of(checkpoints.newest(run)) == STEPS  # type: ignore[arg-type]
    assert len(list((run / "checkpoints").iterdir())) == 1, "torn and older checkpoints are cleared away"
