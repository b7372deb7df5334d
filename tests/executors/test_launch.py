"""Jobs on this machine through NeMo-Run: what succeeds, what fails, and that the difference is told."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import psutil
import pytest
from cluster import wait
from hand import Leave, Slow
from launching import TIME_LIMIT
from nemo.lightning import RestoreConfig
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from aligner import executors
from aligner.checkpoint import folders
from aligner.common.errors import ConfigError
from aligner.common.run_folder import read_metrics
from aligner.executors.local import terminate_children_on_signal


@pytest.fixture(autouse=True)
def nemorun_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(tmp_path / "home"))


def test_a_job_that_fails_is_a_failure_told_by_its_own_error_and_later_stages_do_not_start(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    broken, later = tiny("broken", num_gpus_per_node=2), tiny("later", num_gpus_per_node=2)
    broken.data.train = str(tmp_path / "none.jsonl")
    with pytest.raises(executors.JobFailed, match=r"stage 'broken' ended as FAILED") as found:
        executors.launch({"broken": broken, "later": later}, executors.local(ntasks_per_node=2))
    assert f"RowError: {tmp_path}/none.jsonl: no such file" in str(found.value)
    assert "ChildFailedError" not in str(found.value), "torchrun's"
    assert not (tmp_path / "runs/later").exists()


@pytest.mark.slow
def test_a_stage_begins_with_what_the_one_before_made_and_none_is_made_twice(
    tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stages(steps: int) -> dict[str, Any]:
        first, second = tiny("first"), tiny("second")
        second.resume.restore_config = run.Config(RestoreConfig, path="stage:first")
        second.trainer.max_steps = steps
        return {"first": first, "second": second}

    executors.launch(stages(4), executors.local(), name="chain")
    assert "starting from" in (next((tmp_path / "runs/second").rglob("nemo_log_globalrank-0*"))).read_text()
    assert executors.launch(stages(4), executors.local(), name="chain") == ""
    executors.launch(stages(5), executors.local(), name="chain")
    assert "stage first has succeeded before" in capsys.readouterr().err
    steps = [row["step"] for row in read_metrics(tmp_path / "runs/second/metrics.csv") if "train/loss" in row]
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"a": {"resume.restore_config": "stage:b"}},
            r"'stage:b': there is no such stage before this one; there are: none",
        ),
        ({"dpo llama/8b": {}}, "cannot name a job"),
        ({"nemo_run": {}}, "would take it for a folder of its own"),
        ({"a": {"trainer.devices": 3}}, r"trainer.devices=3, but the executor starts 1 x 1"),
        ({"a": {"data.train": Path("x")}}, r"stage 'a': data.train: PosixPath\('x'\) cannot be shipped to a job"),
        ({"a": {"loss": lambda pairs: 0}}, r"stage 'a': loss: <function .*cannot be shipped to a job"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    tiny: Callable[..., Any], stages: dict[str, dict[str, Any]], message: str
) -> None:
    made = {}
    for stage, changes in stages.items():
        made[stage] = tiny(stage.replace("/", "_"))
        for path, value in changes.items():
            part, _, name = path.rpartition(".")
            at = getattr(made[stage], part) if part else made[stage]
            setattr(at, name, run.Config(RestoreConfig, path=value) if name == "restore_config" else value)
    with pytest.raises(ConfigError, match=message):
        executors.launch(made, executors.local())


def test_a_script_does_not_launch_itself_again(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-Run imports the script that launched a job in the job."""
    monkeypatch.setitem(sys.modules, "__external_main__", sys)
    with pytest.raises(ConfigError, match='put it below `if __name__ == "__main__"'):
        executors.launch({"a": tiny("a")}, executors.local())


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_a_whole_checkpoint(tiny: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny("ended", num_gpus_per_node=2)
    recipe.trainer.max_steps, recipe.trainer.callbacks = 1000, [run.Config(Slow, seconds=0.3)]
    (tmp_path / "recipe").write_text(ZlibJSONSerializer().serialize(recipe))
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import nemo.lightning.io, hand
from nemo_run.config import set_nemorun_home
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from aligner import executors

if __name__ == "__main__":
    set_nemorun_home({str(tmp_path / "home")!r})
    recipe = ZlibJSONSerializer().deserialize(open({str(tmp_path / "recipe")!r}).read())
    executors.launch({{"ended": recipe}}, executors.local(ntasks_per_node=2, env_vars={{"PYTHONPATH": sys.path[0]}}))
"""
    )
    client = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "runs/ended/metrics.csv"
    wait(lambda: metrics.is_file() and len(read_metrics(metrics)) > 4, "some steps")
    family = psutil.Process(client.pid).children(recursive=True)
    assert len(family) >= 3
    client.send_signal(signal.SIGINT)
    assert client.wait(timeout=TIME_LIMIT) == 130
    assert not psutil.wait_procs(family, timeout=100)[1], "somebody is left"
    newest = folders.latest_checkpoint(tmp_path / "runs/ended")
    assert newest is not None and folders.find_corruption(newest) is None
    assert not list((tmp_path / "runs/ended/checkpoints").glob("*.partial"))


def test_an_exit_code_of_0_is_no_success_by_itself(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    recipe = tiny("left", held_out=0)
    recipe.trainer.callbacks = [run.Config(Leave)]
    here = executors.local()
    with pytest.raises(
        executors.JobFailed, match=r"ended with code 0, but its run has not come to its end \(stopped\)"
    ):
        executors.launch({"left": recipe}, here)
    assert not (tmp_path / "runs/left/succeeded.json").exists()


def test_a_terminal_that_closes_is_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminate_children_on_signal():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_earlier_record_does_not_hide_a_refusal(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """A job that is refused before it begins writes none."""
    job = tmp_path / "runs/refused/provenance/job-1/job.json"
    job.parent.mkdir(parents=True)
    job.write_text('{"ended": {"status": "preempted"}}')
    recipe = tiny("refused", held_out=0)
    recipe.loss.beta = -1.0
    with pytest.raises(executors.JobFailed, match=r"loss\.beta: must be above 0"):
        executors.launch({"refused": recipe}, executors.local())
