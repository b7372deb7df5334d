"""Rounds of self-rewarding on sums: as one job or as several, killed anywhere, the same files and weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from launching import TIME_LIMIT
from verifying import by_length

from aligner import executors
from aligner.checkpoint import checkpoint_diff, folders
from aligner.common.errors import ConfigError
from aligner.generate import journal
from aligner.judge.build_pairs import select_pairs
from aligner.judge.self_rewarding import scores, stages
from aligner.recipes import pipelines, smollm2_135m, tiny_llama


def small(dir: Path, name: str = "sums", **settings: Any) -> Any:
    """Two rounds of the demo's pipeline that take seconds; it learns nothing much."""
    prompts = dir / "prompts.jsonl"
    if not prompts.exists():
        dir.mkdir(parents=True, exist_ok=True)
        journal.write(prompts, [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(5) for b in range(4)])
    recipe = tiny_llama.self_rewarding_recipe(
        dir=str(dir), name=name, prompts=str(prompts), iterations=2, num_generations=4, **settings
    )
    learns = [recipe.start, *(one.align for one in recipe.iterations)]
    for run_ in learns:
        run_.model.config.num_layers, run_.model.config.hidden_size, run_.model.config.ffn_hidden_size = 2, 64, 96
        run_.data.micro_batch_size = run_.data.global_batch_size = 4
        run_.trainer.max_steps = run_.optim.lr_scheduler.max_steps = 4
        run_.log.ckpt.every_n_train_steps = 2
    recipe.start.data.micro_batch_size = recipe.start.data.global_batch_size = 64
    recipe.start.trainer.max_steps = recipe.start.optim.lr_scheduler.max_steps = 40
    recipe.start.optim.config.lr = 5e-3
    for one in recipe.iterations:
        # Any judge does that tells answers apart: here by their length.
        one.judge.judge.function = run.Partial(by_length)
        one.evaluate.judge.function = run.Partial(by_length)
        one.evaluate.prompts = str(prompts)
        one.generate.engine.batch_size = 8
    return recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in one job, undisturbed."""
    folder = tmp_path_factory.mktemp("rounds") / "it's größer"
    fdl.build(small(folder))()
    return folder / "sums"


FILES = ("candidates.jsonl", "judgments.jsonl", "train.jsonl", "score.answers.jsonl", "score.json")


def same(one: Path, other: Path) -> None:
    """Files to the last byte, weights to the last bit."""
    for i in (1, 2):
        for name in FILES:
            assert (one / f"iteration-{i}" / name).read_bytes() == (other / f"iteration-{i}" / name).read_bytes(), (
                i,
                name,
            )
        newest = [folders.latest_checkpoint(folder / f"iteration-{i}/policy") for folder in (one, other)]
        assert newest[0] and newest[1]
        assert checkpoint_diff.first_difference(*(checkpoint_diff.read(path) for path in newest if path)) is None


def test_a_round_can_be_read(done: Path) -> None:
    for i in (1, 2):
        here = done / f"iteration-{i}"
        pairs = list(journal.read(here / "train.jsonl"))
        assert pairs
        answers = {row["key"]: row["response"] for row in journal.read(here / "candidates.jsonl")}
        for pair in pairs:
            assert (pair["chosen_reward"], pair["rejected_reward"]) == (1.0, 0.0)
            assert len(pair["chosen_response"]) == 2 != len(pair["rejected_response"])
            assert answers[pair["chosen_key"]] == pair["chosen_response"]
        told = json.loads((here / "train.jsonl.report.json").read_text())
        assert told["metrics"]["pairs"] == len(pairs) and told["metrics"]["prompts"] == 20
        assert sum(told["outcomes"].values()) == 20
        page = (here / "train.jsonl.report.html").read_text()
        assert (
            "<svg" in page
            and pairs[0]["prompt"] in page
            and "http"
            not in page.split("</style>")[1]
            .replace("http://www.w3.org", "")
            .replace("http://purl.org", "")
            .replace("https://matplotlib.org", "")
            .replace("http://creativecommons.org", "")
        )
    assert scores(done) == [json.loads((done / f"iteration-{i}/score.json").read_text())["score"] for i in (1, 2)]
    # The second round answers with what the first one learned.
    first, second = (
        {row["response"] for row in journal.read(done / f"iteration-{i}/candidates.jsonl")} for i in (1, 2)
    )
    assert first != second


def test_again_it_is_there(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")} | {
        path: path.stat().st_mtime_ns for path in done.rglob("candidates.jsonl")
    }
    fdl.build(small(done.parent))()
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_stages_as_jobs_leave_the_same(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """`executors.launch` on this machine: each stage a process, those that are done skipped."""
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    recipe = small(tmp_path)
    shutil.copytree(done / "start", tmp_path / "sums/start")
    # Functions of a test are not for shipping.
    for one in recipe.iterations:
        one.judge.judge.function = one.evaluate.judge.function = run.Partial(_shipped())
    found = {
        name: stage
        for name, stage in stages(recipe).items()
        if name in ("iteration-1-generate", "iteration-1-judge", "iteration-1-select")
    }
    executors.launch(found, executors.local(), name="sums")
    assert (tmp_path / "sums/iteration-1/candidates.jsonl").read_bytes() == (
        done / "iteration-1/candidates.jsonl"
    ).read_bytes()
    capfd.readouterr()
    executors.launch(found, executors.local(), name="sums")
    assert capfd.readouterr().err.count("has succeeded before") == 3


def _shipped() -> Any:
    from aligner.judge.verifiers import exact_match

    return exact_match


def test_all_stages_have_names_and_order(tmp_path: Path) -> None:
    names = list(stages(tiny_llama.self_rewarding_recipe(dir=str(tmp_path), iterations=2)))
    parts = ("generate", "judge", "select", "align", "evaluate")
    assert names == ["start", *(f"iteration-{i}-{part}" for i in (1, 2) for part in parts)]
    meta = stages(smollm2_135m.meta_rewarding_recipe(dir=str(tmp_path), iterations=1))
    assert list(meta) == [f"iteration-1-{part}" for part in ("generate", "judge", "meta_judge", "select", "align")]


JOB = """
import sys
import fiddle as fdl
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
if __name__ == "__main__":
    fdl.build(ZlibJSONSerializer().deserialize(open(sys.argv[1]).read()))()
"""


def killed_when(there: Callable[[], bool], recipe: Any, folder: Path) -> None:
    """Run a pipeline in a process of its own, and end it by SIGKILL at a moment."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    (folder / "job").write_text(ZlibJSONSerializer().serialize(recipe))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", JOB, str(folder / "job")], env=env, start_new_session=True)
    end = time.monotonic() + TIME_LIMIT
    while not there():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, done: Path) -> Iterator[Path]:
    """The pipeline with a judge that can be shipped, from the same start."""
    folder = tmp_path_factory.mktemp("exact")
    shutil.copytree(done / "start", folder / "sums/start")
    fdl.build(shippable(folder))()
    yield folder / "sums"


def shippable(folder: Path) -> Any:
    from aligner.judge.verifiers import instructions

    recipe = small(folder)
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "rules": [{"matches": "^..$"}]} for a in range(5) for b in range(4)]
    journal.write(prompts, rows)
    for one in recipe.iterations:
        for judge in (one.judge.judge, one.evaluate.judge):
            judge.function = run.Partial(instructions, field="rules")
    return recipe


def named(folder: Path) -> tuple[str, str, str]:
    """Prompts, candidates, judgments."""
    return str(folder / "p.jsonl"), str(folder / "c.jsonl"), str(folder / "j.jsonl")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "generating": lambda at: lines(at / "iteration-1/candidates.jsonl.parts/00000.jsonl") >= 5,
    "between generating and judging": lambda at: (at / "iteration-1/candidates.jsonl").exists(),
    "judging": lambda at: (at / "iteration-1/judgments.jsonl.parts").exists(),
    "selecting": lambda at: (at / "iteration-1/train.jsonl.report.json").exists(),
    "between selecting and aligning": lambda at: (at / "iteration-1/train.jsonl").exists(),
    "aligning": lambda at: (at / "iteration-1/policy/checkpoints/step=2").exists(),
    "evaluating": lambda at: lines(at / "iteration-1/score.answers.jsonl.parts/00000.jsonl") >= 3,
    "the second round": lambda at: lines(at / "iteration-2/candidates.jsonl.parts/00000.jsonl") >= 5,
    "the second aligning": lambda at: (at / "iteration-2/policy/checkpoints/step=2").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_anywhere_changes_nothing(exact: Path, tmp_path: Path, moment: str) -> None:
    shutil.copytree(exact / "start", tmp_path / "sums/start")
    killed_when(lambda: MOMENTS[moment](tmp_path / "sums"), shippable(tmp_path), tmp_path)
    fdl.build(shippable(tmp_path))()
    same(exact, tmp_path / "sums")


def test_a_file_made_by_hand_takes_the_place_of_a_stage(done: Path, tmp_path: Path) -> None:
    journal.write(tmp_path / "p.jsonl", [{"id": "a", "prompt": "1+1="}])
    journal.write(
        tmp_path / "c.jsonl",
        [{"key": f"a/{i}", "response": text, "num_tokens": 1, "finish_reason": "stop"} for i, text in enumerate("23")],
    )
    journal.write(tmp_path / "j.jsonl", [{"key": "a/0/0", "score": 5}, {"key": "a/1/0", "score": 1}])
    (row,) = journal.read(select_pairs(*named(tmp_path), str(tmp_path / "t.jsonl")))
    assert (row["chosen_response"], row["rejected_response"]) == ("2", "3")
    with pytest.raises(ConfigError, match=r"length_control: is 0.1, but .*t.jsonl was begun with 0.0"):
        select_pairs(*named(tmp_path), str(tmp_path / "t.jsonl"), length_control=0.1)
    journal.write(tmp_path / "own.jsonl", [{"prompt": "1+1=", "chosen_response": "2", "rejected_response": "4"}])
    (kept,) = journal.read(select_pairs(*named(tmp_path), str(tmp_path / "own.jsonl")))
    assert kept["rejected_response"] == "4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": [0.1, 0.2]}, "beta: has 2 values for 3 iterations"),
        ({"length_control": [0.0]}, "length_control: has 1 values for 3 iterations"),
        ({"iterations": 0}, "iterations: must be at least 1"),
    ],
)
def test_lists_are_as_long_as_the_iterations(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_llama.self_rewarding_recipe(**settings)


def test_values_of_an_iteration_arrive_there() -> None:
    recipe: Any = tiny_llama.self_rewarding_recipe(beta=[0.1, 0.2, 0.3], length_control=[0.0, 0.0, 0.1])
    assert [one.align.loss.beta for one in recipe.iterations] == [0.1, 0.2, 0.3]
    assert [one.select.length_control for one in recipe.iterations] == [0.0, 0.0, 0.1]
    assert len({one.generate.seed for one in recipe.iterations}) == 3
    assert [one.generate.engine.checkpoint for one in recipe.iterations][1:] == [
        f"runs/tiny_self_rewarding/iteration-{i}/policy" for i in (1, 2)
    ]
    assert recipe.iterations[1].align.resume.restore_config.path == "runs/tiny_self_rewarding/iteration-1/policy"
    assert pipelines.per_iteration("x", 1, 2) == [1, 1]
