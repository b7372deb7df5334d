"""A run killed by SIGKILL, after a checkpoint and in the middle of writing one, and run again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import TIME_LIMIT
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from aligner.checkpoint import folders
from aligner.common.run_folder import read_metrics

STEPS = 60
COMMAND = [
    str(Path(sys.executable).parent / "nemo"), "llm", "align", "--factory", "tiny_dpo", "-y", "resume.init_stage=None",
    f"trainer.max_steps={STEPS}", "log.ckpt.every_n_train_steps=10", "trainer.val_check_interval=20",
    "data.global_batch_size=8", "data.micro_batch_size=8", "model.config.num_layers=2",
]  # fmt: skip


def kill_when(ready: Callable[[Path], bool], cwd: Path) -> None:
    """Start the run, kill it with all its processes as soon as `ready` says so."""
    process = subprocess.Popen(
        COMMAND, cwd=cwd, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder, deadline = cwd / "runs/tiny_dpo/checkpoints", time.monotonic() + TIME_LIMIT
    while not ready(folder):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def whole(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step=*") if path.is_dir() and not folders.is_unfinished(path)]


def writing(folder: Path) -> bool:
    """A second checkpoint has begun, the first one is whole."""
    return bool(whole(folder)) and any(folder.glob("step=20.partial"))


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    kill_when(writing, tmp_path)
    run = tmp_path / "runs/tiny_dpo"
    left = folders.latest_checkpoint(run)
    assert left is not None
    step = folders.step_of(left)
    assert 10 <= step < STEPS

    again = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from step {step}" in again.stderr
    assert f"step {STEPS}" in again.stdout
    trained = [row["step"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert trained == list(range(STEPS))
    assert folders.step_of(folders.latest_checkpoint(run)) == STEPS  # type: ignore[arg-type]
    assert len(list((run / "checkpoints").iterdir())) == 1, "torn and older checkpoints are cleared away"


KILLS = """
import os, random, signal, sys, time
import fiddle as fdl
import aligner.train.training_run, nemo.collections.llm, nemo.lightning.io
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

job, moments, draw = open(sys.argv[1]).read(), int(sys.argv[2]), random.Random(int(sys.argv[3]))
from pathlib import Path
from aligner.checkpoint import folders

run, step, inside = Path(sys.argv[4]), 0, 0
for moment in range(moments):
    left = set((run / "checkpoints").glob("*.partial"))
    child = os.fork()
    if not child:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        fdl.build(ZlibJSONSerializer().deserialize(job))()
        os._exit(0)
    while os.getpgid(child) != child:
        time.sleep(0.001)
    # Half of them wherever they fall, half as soon as a checkpoint is being written or removed.
    look = draw.random() < 0.5
    deadline = time.monotonic() + (30 if look else draw.uniform(0.2, 8))
    while time.monotonic() < deadline:
        if look and set((run / "checkpoints").glob("*.partial")) - left:
            time.sleep(draw.uniform(0, 0.2))
            break
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == -9, ended
    inside += any((run / "checkpoints").glob("*.partial"))
    found = folders.latest_checkpoint(run)
    at = folders.step_of(found) if found else 0
    assert at >= step, (at, step)
    assert found is None or folders.find_corruption(found) is None
    step = at
    print(moment, at, inside, file=sys.__stdout__, flush=True)
print("steps", step, "inside", inside, file=sys.__stdout__, flush=True)
"""


@pytest.mark.slow
def test_kills_at_a_hundred_random_moments_lose_no_checkpoint(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """A run that saves every step and never ends; each job goes on from what the one before left."""
    recipe = tiny(held_out=0)
    recipe.trainer.max_steps, recipe.log.ckpt.every_n_train_steps = 100_000, 1
    (tmp_path / "job").write_text(ZlibJSONSerializer().serialize(recipe))
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "job"), "100", "7", str(tmp_path / "runs/run")],
        capture_output=True, text=True, timeout=6000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    steps, inside = (int(word) for word in done.stdout.splitlines()[-1].split()[1::2])
    assert steps > 50 and inside >= 20, "it made progress all the while, and kills fell into saving, too"
