"""A real Slurm of two nodes on this machine: what comes back of a job, what goes back into the queue, what does not.

Needs root and Debian's packages, which are installed where they are missing.
"""

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from cluster import HERE, slurm, wait
from launching import TIME_LIMIT
from nemo_run.config import get_nemorun_home
from submitting import STEPS, Background, in_background, same_weights, slow, steps_of, submitting_from
from warm import export_lines as warm_lines

from aligner import executors
from aligner.common.errors import ConfigError
from aligner.common.run_folder import job_folders

Tiny = Callable[..., Any]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module", autouse=True)
def cluster(home: Path) -> Iterator[None]:
    """Without accounts; where jobs are started from has a name that needs quotes."""
    place = home / "from here"
    place.mkdir()
    with slurm(home / "cluster") as environment, submitting_from(place, environment, home / "nemorun"):
        yield


def on_slurm(warm: bool = False, **settings: Any) -> run.SlurmExecutor:
    """Two nodes with a GPU each; `warm`: ranks are forked from a process that has NeMo imported (see warm.py)."""
    given: dict[str, Any] = {"account": "tests", "partition": "gpu", "nodes": 2, "gpus_per_node": 1} | settings
    tests = str(Path(__file__).parent.parent)
    return executors.slurm(
        mem="3000",
        exclusive=False,
        env_vars=HERE,
        setup_lines=[f"export PYTHONPATH=$PYTHONPATH:{shlex.quote(tests)}", *(warm_lines() if warm else [])],
        **given,
    )


def queue(name: str) -> list[str]:
    """The jobs of a stage that Slurm has not done with."""
    shown = subprocess.run(["squeue", "-h", "-o", "%i %T %j"], capture_output=True, text=True, check=True).stdout
    jobs = [line.split() for line in shown.splitlines()]
    return [job for job, state, title in jobs if state != "COMPLETING" and title.endswith(f".{name}")]


@pytest.fixture(scope="module")
def undisturbed(home: Path, tiny_in: Callable[[Path], Tiny]) -> Path:
    """A run of 12 steps on two nodes, in a folder with a name that needs quotes."""
    folder = home / "it's größer"
    folder.mkdir()
    recipe = slow(tiny_in(folder), "straight", 0.0)
    identity = executors.launch({"straight": recipe}, on_slurm(), name="straight")
    (home / "identity").write_text(identity)
    return folder / "runs/straight"


def launched(recipe: Any, name: str, **settings: Any) -> Background:
    return in_background(lambda: executors.launch({name: recipe}, on_slurm(**settings), name=name))


@pytest.fixture(scope="module", autouse=True)
def limited(
    request: pytest.FixtureRequest, undisturbed: Path, home: Path, tiny_in: Callable[[Path], Tiny]
) -> Background | None:
    """The same run in jobs of two minutes that are warned after 30 to 60 seconds: Slurm looks twice a minute.

    It goes on beside the other tests, and is not begun where nobody asks for its end.
    """
    if not any(item.name == "test_a_time_limit_is_not_an_end" for item in request.session.items):
        return None
    recipe = slow(tiny_in(home), "limited", 3.0)
    return launched(recipe, "limited", time="00:02:00", signal_delay_s=60)


def test_a_run_on_two_nodes_comes_back_with_its_log(undisturbed: Path, home: Path, capfd: Any) -> None:
    assert steps_of(undisturbed) == list(range(STEPS))
    identity = (home / "identity").read_text()
    again = run.Experiment.from_id(identity)
    (said,) = (again.status(return_dict=True) or {}).values()
    assert str(said["status"]).endswith("SUCCEEDED")
    (log,) = Path(said["local_dir"]).glob("log-*.out")
    lines = log.read_text()
    assert "\n0: [align] train: 16 of 16 pairs" in lines and "\n1: " in lines
    # The recipe is kept, and who ran it; no second time.
    assert (undisturbed / "config.yaml").is_file()
    assert executors.launch({"straight": _recipe_of(undisturbed)}, on_slurm(), name="straight") == ""
    assert "has succeeded before" in capfd.readouterr().err


def _recipe_of(folder: Path) -> Any:
    from aligner.cli.parsing.yaml_recipe import load_yaml

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_ALIGN_TRUST", "hand")  # whose callback it names
        return load_yaml(folder / "config.yaml")


def begin_now(job: str) -> None:
    """Slurm lets a job that was put back wait for two minutes, from when its last process ended."""
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)


def again(job: str) -> bool:
    said = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True).stdout
    return "Restarts=1" in said and "JobState=RUNNING" in said


def test_a_job_that_is_put_back_goes_on(undisturbed: Path, tiny: Tiny, tmp_path: Path) -> None:
    thread, failed = launched(slow(tiny, "requeued", 0.7), "requeued", warm=True)
    wait(lambda: len(steps_of(tmp_path / "runs/requeued")) >= 2, "two steps")
    (job,) = queue("requeued")
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait(lambda: (begin_now(job), again(job))[1], "the job to run again")
    thread.join(timeout=TIME_LIMIT)
    assert not thread.is_alive() and not failed, failed
    assert list(job_folders(tmp_path / "runs/requeued")) == [1, 2]
    same_weights(undisturbed, tmp_path / "runs/requeued")


def test_a_failure_is_told_and_what_depends_on_it_never_begins(tiny: Tiny, tmp_path: Path) -> None:
    broken, later = tiny("broken"), tiny("later")
    broken.data.train = str(tmp_path / "none.jsonl")
    later.resume.restore_config = run.Config(_restore(), path="stage:broken")
    with pytest.raises(executors.JobFailed) as found:
        executors.launch({"broken": broken, "later": later}, on_slurm(nodes=1, warm=True), name="chain")
    said = str(found.value)
    assert "stage 'broken' ended as FAILED (job " in said and "exit code 1, on n" in said
    assert "not begun: later" in said
    assert f"0: RowError: {tmp_path / 'none.jsonl'}: no such file; expected JSON lines" in said
    assert "all of it: nemo experiment logs chain_" in said
    assert not (tmp_path / "runs/later").exists()


def _restore() -> Any:
    from nemo.lightning import RestoreConfig

    return RestoreConfig


@pytest.mark.slow
def test_the_code_of_the_job_is_that_of_the_folder_it_is_called_in(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What git knows, with what is not committed yet, before what is installed."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for room in ("aligner", "recipes", "executors"):
        shutil.copytree(ROOT / room, repository / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(repository)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@b")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", *words], check=True)
    changed = repository / "aligner/train/summary.py"
    changed.write_text(changed.read_text().replace('f"{split}: {report}"', 'f"{split}, said anew: {report}"'))
    (repository / "extra.py").write_text("")
    executors.launch({"code": tiny("code")}, on_slurm(nodes=1), name="code")
    said = capsys.readouterr().err
    assert "not shipped: extra.py" in said
    assert "shipped as they are, not as they were committed: aligner/train/summary.py" in said
    (log,) = (Path(get_nemorun_home()) / "experiments/code").glob("*/code/log-*.out")
    assert "train, said anew: 16 of 16 pairs" in log.read_text()
    job = tmp_path / "runs/code/provenance/job-1"
    assert "said anew" in (job / "code.diff").read_text()
    assert not subprocess.run(["git", "stash", "list"], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_cancelled_job_is_not_a_success(tiny: Tiny, tmp_path: Path) -> None:
    thread, failed = launched(slow(tiny, "canceled", 0.5, steps=40), "canceled")
    wait(lambda: len(steps_of(tmp_path / "runs/canceled")) >= 1, "a step")
    (job,) = queue("canceled")
    subprocess.run(["scancel", job], check=True)
    thread.join(timeout=TIME_LIMIT)
    (error,) = failed
    assert isinstance(error, executors.JobFailed) and "ended as CANCELLED" in str(error)


def test_what_the_cluster_has_not_is_refused_at_once(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("refused")

    def refused(pattern: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=pattern):
            executors.launch({"refused": recipe}, on_slurm(nodes=1, **settings), name="refused")

    refused(r"run.executor.partition: there is no 'cpu'; there are: gpu", partition="cpu")
    refused(r"run.executor.container_image: .*has no pyxis", container_image="nemo:25.07")
    refused(r"not submitted, sbatch says: .*Requested node configuration is not available", sbatch={"gres": "gpu:9"})
    refused(r"run.executor.ssh: nobody@127.0.0.1 cannot be reached", ssh="nobody@127.0.0.1:9", job_dir="/tmp/x")
    with pytest.raises(ConfigError, match=r"trainer.num_nodes=1 and .*but the executor starts 2 x 1"):
        executors.launch({"refused": recipe}, on_slurm(nodes=2), name="refused")
    assert not queue("refused")


def test_a_dry_run_shows_the_script_and_submits_nothing(tiny: Tiny, capfd: Any) -> None:
    executors.dryrun({"shown": tiny("shown", num_nodes=2)}, on_slurm(), name="shown")
    found = capfd.readouterr()
    assert "#SBATCH --nodes=2" in found.out and "#SBATCH --signal=TERM@120" in found.out
    assert "files of the job: " in found.err and "shown_fn_or_script" in found.err
    assert not queue("shown")


@pytest.mark.slow
def test_a_time_limit_is_not_an_end(limited: Background, undisturbed: Path, home: Path) -> None:
    thread, failed = limited
    thread.join(timeout=TIME_LIMIT)
    assert not thread.is_alive() and not failed, failed
    assert len(job_folders(home / "runs/limited")) >= 2
    same_weights(undisturbed, home / "runs/limited")


@pytest.mark.slow
def test_a_pipeline_of_self_rewarding_is_jobs_that_follow_each_other(tmp_path: Path) -> None:
    """The same files from Slurm's jobs, on two nodes, as from one process here."""
    import fiddle as fdl

    from aligner.judge import self_rewarding

    def recipe(dir: Path, nodes: int) -> Any:
        from aligner.recipes import tiny_llama

        dir.mkdir(exist_ok=True)
        made = tiny_llama.self_rewarding_recipe(
            dir=str(dir), name="sums", num_nodes=nodes, iterations=1, num_generations=2
        )
        for learns in (made.start, made.iterations[0].align):
            learns.model.config.num_layers = 2
            learns.trainer.max_steps = learns.optim.lr_scheduler.max_steps = 100 if learns is made.start else 4
        made.iterations[0].align.data.global_batch_size = made.iterations[0].align.data.micro_batch_size = 4
        if nodes == 2:
            made.start.data.micro_batch_size = 32
            made.iterations[0].align.data.micro_batch_size = 2
        return made

    fdl.build(recipe(tmp_path / "here", 1))()
    jobs = recipe(tmp_path / "there", 2)
    # Rounding differs with the number of ranks that train, so both begin with the same policy.
    shutil.copytree(tmp_path / "here/sums/start", tmp_path / "there/sums/start")
    stages = self_rewarding.stages(jobs)
    del stages["start"]
    executors.launch(stages, on_slurm(), name="sums")
    for name in ("candidates", "judgments", "train"):
        one, other = (tmp_path / place / f"sums/iteration-1/{name}.jsonl" for place in ("here", "there"))
        assert one.read_bytes() == other.read_bytes(), name
    assert (tmp_path / "there/sums/iteration-1/score.json").is_file()
