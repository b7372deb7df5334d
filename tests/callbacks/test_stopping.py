"""Jobs that are told to end, hang, or compute what is no number."""

import contextlib
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nemo_run as run
import pytest
from hand import Disturb, Slow, no_gradient, no_number
from launching import NEMO, TIME_LIMIT, forked
from nemo.lightning.pytorch.callbacks import PreemptionCallback

from aligner.callbacks import preemption, watchdog
from aligner.callbacks.loss_anomaly import LossAnomalyCallback
from aligner.checkpoint import folders
from aligner.common.errors import ConfigError, SanityCheckError
from aligner.common.run_folder import read_metrics
from aligner.train.limits import Limits

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]


def ended(name: str, ranks: int, *callbacks: Any, limit: str | None = None) -> Callable[[Tiny], tuple[int, Any]]:
    """A run of eight steps that saves every other one, and what ends it."""

    def job(tiny: Tiny) -> tuple[int, Any]:
        recipe = tiny(name, num_gpus_per_node=ranks)
        recipe.trainer.max_steps, recipe.log.ckpt.every_n_train_steps = 8, 2
        recipe.trainer.callbacks = list(callbacks)
        recipe.limits.max_time_per_run = limit
        return ranks, recipe

    return job


TERM, USR1, HUP, INT = map(int, (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT))
ENDED = {
    "term": ended("term", 2, run.Config(Disturb, at=2, rank=1, signals=(TERM,))),
    "time": ended("time", 1, run.Config(Slow, seconds=0.5), limit="00:00:01"),
}
OTHERS = {
    "usr1": ended("usr1", 1, run.Config(Disturb, at=2, signals=(USR1,))),
    "hup": ended("hup", 1, run.Config(Disturb, at=2, signals=(HUP,))),
    "twice": ended("twice", 1, run.Config(Disturb, at=3, signals=(USR1, USR1))),
    "validating": ended("validating", 1, run.Config(Disturb, at=1, signals=(TERM,)), run.Config(Slow, seconds=0.1)),
}


def end_and_go_on(tiny: Tiny, folder: Path, jobs: dict[str, Callable[[Tiny], tuple[int, Any]]]) -> tuple[Any, str, Any]:
    """Exit codes, what was said, and the step of the checkpoint that each left; all are then gone on with."""
    codes, said = forked(folder, [job(tiny) for job in jobs.values()])
    assert "exiting with code 75; run the same command again to resume" in said
    newest = {name: folders.latest_checkpoint(folder / "runs" / name) for name in jobs}
    left = {name: folders.step_of(path) for name, path in newest.items() if path}
    again, told = forked(folder, [ended(name, job(tiny)[0])(tiny) for name, job in jobs.items()])
    assert again == [[0] * job(tiny)[0] for job in jobs.values()], told[-5000:]
    for name in jobs:
        assert steps(folder / "runs" / name) == list(range(8)), name
    return codes, said, left


def test_a_signal_and_time_end_the_step_save_and_ask_for_another_job(tiny: Tiny, tmp_path: Path) -> None:
    """SIGTERM to one rank of two; a time limit; each is then gone on with."""
    codes, said, left = end_and_go_on(tiny, tmp_path, ENDED)
    assert codes == [[75, 75], [75]], said[-5000:]
    assert "it received SIGTERM: saving after step 3" in said and "its time is up: " in said
    assert left["term"] == 3 and 0 < left["time"] < 8


@pytest.mark.slow
def test_other_signals_do_as_well(tiny: Tiny, tmp_path: Path) -> None:
    """SIGUSR1; a terminal that closes; a second one while it is saved; SIGTERM while it validates."""
    codes, said, left = end_and_go_on(tiny, tmp_path, OTHERS)
    assert codes == [[75], [75], [-USR1], [75]], said[-5000:]
    assert "it received SIGUSR1: saving after step 3" in said and "it received SIGHUP: saving after step 3" in said
    assert left["usr1"] == left["hup"] == 3 and left["validating"]
    assert left["twice"] == 2, "what the second signal found was whole"


def test_an_interrupted_cell_saves_and_raises(
    tiny: Tiny, execute: Execute, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    recipe = tiny()
    recipe.trainer.max_steps, recipe.log.ckpt.every_n_train_steps = 8, 8
    recipe.trainer.callbacks = [run.Config(Disturb, at=2, signals=(INT,))]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        execute(recipe)
    assert signal.getsignal(signal.SIGINT) is before
    assert "it received SIGINT: saving after step 3" in "".join(capfd.readouterr())
    recipe.trainer.callbacks = []
    assert steps(execute(recipe)) == list(range(8))
    # While the reference is scored there is nothing to save, and no step to wait for.
    other = tiny("scoring")
    other.trainer.callbacks = [run.Config(Disturb, at=-1, signals=(INT,))]
    with pytest.raises(KeyboardInterrupt):
        execute(other)
    assert "it received SIGINT: nothing new to save after step 0" in "".join(capfd.readouterr())


def test_nemos_own_callback_does_not_take_the_signal(
    tiny: Tiny, execute: Execute, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would end the job with code 0 after the step, with steps to make."""
    recipe = tiny()
    recipe.trainer.max_steps, recipe.log.ckpt.every_n_train_steps = 8, 8
    callback = run.Config(PreemptionCallback, sig=int(signal.SIGUSR2))
    recipe.trainer.callbacks = [callback, run.Config(Disturb, at=2, signals=(int(signal.SIGUSR2),))]
    with pytest.raises(preemption.Preempted, match="75"):
        execute(recipe)
    told = "".join(capfd.readouterr())
    assert "NeMo's PreemptionCallback is left out" in told and "it received SIGUSR2: saving after step 3" in told
    recipe.trainer.callbacks = [callback]
    assert steps(execute(recipe)) == list(range(8))


def test_signals_that_a_shell_ignores_stay_ignored() -> None:
    stopper = preemption.Preemption(None, SimpleNamespace(step_saved=0), began=0.0)  # type: ignore[arg-type]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopper.listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "twice", "closed"])
def test_a_terminal(tmp_path: Path, how: str) -> None:
    """Ctrl-C, pressed once or twice, and a window that closes: `nemo` in a terminal of its own."""
    words = ["trainer.max_steps=100000", "log.ckpt.every_n_train_steps=50000"]
    if how == "twice":
        words.append("data.global_batch_size=4096")  # a step of some seconds
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(NEMO, [NEMO, "llm", "align", "--factory", "tiny_sft", "-y", *words])
    metrics, said, code = tmp_path / "runs/tiny_sft/metrics.csv", b"", None
    pressed, began = 0, time.monotonic()
    while code is None:
        assert time.monotonic() - began < TIME_LIMIT
        under_way = metrics.is_file() and len(metrics.read_text().splitlines()) > (1 if how == "twice" else 5)
        if how == "closed" and under_way and not pressed:
            os.close(terminal)
            pressed = 1
        elif how != "closed" and under_way and pressed < (2 if how == "twice" else 1):
            os.write(terminal, b"\x03")
            pressed += 1
            time.sleep(1.0)  # two signals at once are one
        if how != "closed" or not pressed:
            with contextlib.suppress(OSError):  # the end of what is written
                if select.select([terminal], [], [], 0.2)[0]:
                    said += os.read(terminal, 10000)
        ended_now, status = os.waitpid(process, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended_now else None
    newest = folders.latest_checkpoint(tmp_path / "runs/tiny_sft")
    if how == "twice":
        assert code == -signal.SIGINT and newest is None
        return
    assert newest is not None and folders.find_corruption(newest) is None
    assert code == (130 if how == "ctrl-c" else 75), said[-3000:]
    log = "".join(path.read_text() for path in (tmp_path / "runs/tiny_sft").glob("nemo_log_globalrank-0*"))
    for text in (said.decode(), log) if how == "ctrl-c" else (log,):
        assert f"saving after step {folders.step_of(newest)}" in text


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_what_it_does(tiny: Tiny, tmp_path: Path) -> None:
    def job(name: str, **what: Any) -> tuple[int, Any]:
        recipe = tiny(name, num_gpus_per_node=2)
        recipe.limits.hang_timeout_s = 3.5
        # Saving takes as long where the machine is busy.
        recipe.log.ckpt.every_n_train_steps = None
        recipe.trainer.callbacks = [run.Config(Disturb, at=2, rank=1, **what)]
        return 2, recipe

    codes, said = forked(tmp_path, [job("asleep", sleep=9.0), job("stopped", stop=11.0)])
    assert codes == [[0, 0], [0, 0]], "what goes on again is left alone"
    asleep, stopped = said.split("ended [0, 0]")[:2]
    assert "rank 1 is behind the others" in asleep
    assert "rank 1: step 2, waits for its batch: tests/hand.py" in asleep
    assert "rank 0: step 2, forward and backward: " in asleep or "rank 0: step 2, optimizer step: " in asleep
    assert "rank 1 says nothing: stopped, ended, or its machine is gone" in stopped


def test_the_report_begins_with_the_one_that_holds_the_others_up(tmp_path: Path) -> None:
    def at(rank: int, step: int, phase: str) -> dict[str, Any]:
        return {"rank": rank, "step": step, "phase": phase, "seconds": 61.0, "stack": ["a.py:1 f", "b.py:2 g"]}

    found = [at(0, 7, "optimizer step"), at(1, 7, "waits for its batch"), at(2, 7, "optimizer step")]
    lines = watchdog.report(found, 3, folder=tmp_path).splitlines()
    assert lines[0].startswith("no progress for 61 s; rank 1 is behind the others")
    assert lines[1] == "  rank 1: step 7, waits for its batch: a.py:1 f < b.py:2 g"
    assert "rank 1 says nothing" in watchdog.report(found[::2], 3, folder=tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_with_its_rows(tiny: Tiny, tmp_path: Path) -> None:
    """Before the weights move, on all ranks, wherever in the global batch the rows lie."""
    jobs = []
    for ranks in (1, 2):
        recipe = tiny(f"nan{ranks}", num_gpus_per_node=ranks)
        file = tmp_path / "bad.jsonl"
        rows = [json.loads(line) for line in Path(recipe.data.train).read_text().splitlines()]
        rows[5]["chosen_response"] = rows[11]["chosen_response"] = "1234567"
        file.write_text("\n".join(map(json.dumps, rows)))
        recipe.data.train, recipe.loss = str(file), run.Partial(no_number, length=8.0)
        recipe.log.ckpt.every_n_train_steps = 1
        jobs.append((ranks, recipe))
    codes, said = forked(tmp_path, jobs)
    assert codes == [[1], [1, 1]], said[-3000:]
    named = [line for line in said.splitlines() if "SanityCheckError: step" in line]
    assert len(named) == 3 and named[1] == named[2]
    assert all("examples is not finite: " in line and "No weight was changed" in line for line in named)
    assert all("bad.jsonl:6" in line or "bad.jsonl:12" in line for line in named)
    first = int(named[0].split("step ")[1].split(":")[0])
    for name in ("nan1", "nan2"):
        left = folders.latest_checkpoint(tmp_path / "runs" / name)
        assert (folders.step_of(left) if left else 0) == first


def test_a_gradient_that_is_no_number_is_not_saved(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    recipe = tiny()
    recipe.loss = run.Partial(no_gradient, after=1e-4)
    recipe.log.ckpt.every_n_train_steps = 1
    with pytest.raises(
        SanityCheckError, match=r"step 1: the gradient norm is nan, though every loss is finite.*train16\.jsonl:"
    ):
        execute(recipe)
    left = folders.latest_checkpoint(tmp_path / "runs/run")
    assert left is not None and folders.step_of(left) == 1


def test_a_jump_of_the_loss_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Data:
        packs: dict[str, Any] = {}  # noqa: RUF012
        datasets = {"train": [type("E", (), {"source": f"rows.jsonl:{i}"}) for i in range(4)]}  # noqa: RUF012

        def global_batch(self, step: int) -> list[int]:
            return [1, 3]

    health: Any = LossAnomalyCallback(Data(), None, None, loss_spike_std=6.0, run=tmp_path)  # type: ignore[arg-type]
    for step in range(30):
        health.after_step(SimpleNamespace(global_step=step + 1, is_global_zero=True), 0.5 + 0.01 * (-1) ** step, 1.0)
    assert not capsys.readouterr().err
    (tmp_path / "provenance").mkdir()
    health.after_step(SimpleNamespace(global_step=31, is_global_zero=True), 0.9, 1.0)
    assert '{"step": 30, "text": "the loss is 0.9, 39.' in (tmp_path / "provenance/notes.jsonl").read_text()
    assert "step 30: the loss is 0.9, 39." in (said := capsys.readouterr().err)
    assert "rows.jsonl:1, rows.jsonl:3" in said


@pytest.mark.parametrize("wrong", ["3h", "10:00", "00:00:00", "-1:00:00", 5])
def test_a_time_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"limits.max_time_per_run"):
        Limits(max_time_per_run=wrong)


def test_times_are_read_with_days_or_without() -> None:
    assert Limits(max_time_per_run="1:02:03:04").seconds == 93784
    assert Limits(max_time_per_run="03:45:00").seconds == 13500


def test_listening_leaves_the_process_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = preemption.Preemption(None, None, began=time.monotonic())  # type: ignore[arg-type]
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
