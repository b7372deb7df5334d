"""Verifiers in worker processes: what goes wrong costs one score, not the stage."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aligner.common.errors import ConfigError, RowError
from aligner.generate import journal
from aligner.judge import verifiers
from aligner.judge.judges import Verifier, judge_responses

FUNCTIONS = """
import os, re, time
from aligner.common.errors import ConfigError, RowError

def score(row, response, there="x"):
    if response == "raise": raise ValueError("no such\\nword")
    if response == "exit": raise SystemExit(3)
    if response == "die": os._exit(7)
    if response == "abort": os.abort()
    if response == "hang": time.sleep(1000)
    if response == "match": return bool(re.search("(a+)+$", "a" * 40 + "b"))
    if response == "memory": return len(bytearray(1 << 33))
    if response == "deep": return score(row, response)
    if response == "nan": return float("nan")
    if response == "text": return "much"
    if response == "none": return None
    if response == "row": raise RowError("here: is wrong")
    if response == "config": raise ConfigError("there: is wrong")
    if response == "key": return row[there]
    if response == "again": return 1.0 if os.path.exists(there) else score(row, "raise")
    return float(len(response))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"verifiers_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(name).score


def stage(folder: Path, responses: list[str], verifier: Verifier) -> list[dict[str, Any]]:
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": str(i)}) + "\n" for i in range(len(responses)))
    )
    rows = [{"key": f"p{i}/0", "response": text, "finish_reason": "stop"} for i, text in enumerate(responses)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = judge_responses(
        str(folder / "prompts.jsonl"), str(folder / "answers.jsonl"), str(folder / "judgments.jsonl"), verifier
    )
    return list(journal.read(output))


def test_each_failure_costs_one_score(mine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = {
        "raise": "ValueError: no such", "exit": "SystemExit: 3", "die": "the worker process ended with exit code 7",
        "abort": "the worker process was ended by SIGABRT", "hang": "took more than 1 s",
        "match": "took more than 1 s", "memory": "MemoryError",
        "deep": "RecursionError: maximum recursion depth exceeded",
        "nan": "the score is nan, which is no finite number",
        "text": "ValueError: could not convert string to float: 'much'", "none": "TypeError: float() argument must be",
    }  # fmt: skip
    responses = ["ab", *reasons, "abc", "x=\ud83d"]
    rows = stage(tmp_path, responses, Verifier(mine, seconds=1, memory_mb=512, workers=2, max_failure_rate=0.9))
    assert [row["key"] for row in rows] == [f"p{i}/0/0" for i in range(len(responses))]
    assert [row["score"] for row in rows] == [2, *[None] * len(reasons), 3, 3]
    assert rows[0] == {"key": "p0/0/0", "score": 2.0, "judgment": "", "finish_reason": "stop"}
    for row, reason in zip(rows[1:-2], reasons.values(), strict=True):
        assert row["finish_reason"] == "failed" and row["error"].startswith(reason) and "\n" not in row["error"]
    told = capsys.readouterr().err
    assert "judgments.jsonl: 11 of 14 responses have no score: 2 times took more than 1 s; 1 times" in told


def test_too_many_failures_end_the_stage_and_a_rerun_asks_again(mine: Any, tmp_path: Path) -> None:
    verifier = Verifier(partial(mine, there=str(tmp_path / "mended")), workers=1)
    responses = ["a", "bb", "again", "cc"]
    with pytest.raises(
        ConfigError,
        match=r"judge.function: 1 of 4 responses have no score, more than judge.max_failure_rate=0.05 allows; the "
        r"first is .*prompts.jsonl:3, response p2/0: ValueError: no such; mend",
    ):
        stage(tmp_path, responses, verifier)
    kept = [row for part in (tmp_path / "judgments.jsonl.parts").glob("*.jsonl") for row in journal.read(part)]
    assert [row["key"] for row in kept] == ["p0/0/0", "p1/0/0"]
    (tmp_path / "mended").touch()
    assert [row["score"] for row in stage(tmp_path, responses, verifier)] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        ("row", RowError, "here: is wrong"), ("config", ConfigError, "there: is wrong"),
        ("key", RowError, r"prompts.jsonl:2: has no 'x', which the verifier compares with"),
    ],
)  # fmt: skip
def test_an_invalid_row_or_argument_ends_the_stage(
    mine: Any, tmp_path: Path, response: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stage(tmp_path, ["a", response], Verifier(mine, max_failure_rate=1))


def test_functions_that_workers_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"judge.function: .*lambda.* cannot be passed to a worker process .*; define"
    ):
        stage(tmp_path, ["a"], Verifier(lambda row, response: 1))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom aligner.judge.scoring_pool import scores\ndef f(row, response): return len(response)\n"
        "run = lambda: print(list(scores(f, [({}, 'ab')], workers=1, seconds=9, memory_mb=99)))\n"
        "if __name__ == '__main__' or 'bare' in sys.argv: run()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert "score=2.0" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, str(script), "bare"], capture_output=True, text=True, timeout=60)
    assert "could import the function; a script that defines it needs" in done.stderr
    code = script.read_text()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "judge.function: a worker process cannot import it (AttributeError: " in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "judge.workers: must be at least 1, found 0"),
        ({"seconds": 0}, "judge.seconds: must be above 0, found 0"),
        ({"memory_mb": -1}, "judge.memory_mb: must be above 0"), ({"max_failure_rate": 2}, "between 0 and 1, found 2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(tmp_path, ["a"], Verifier(verifiers.exact_match, **settings))


def test_workers_run_at_a_time_and_load_little(mine: Any, tmp_path: Path) -> None:
    code = (
        "import sys, aligner.judge.verifiers, aligner.judge.scoring_pool\n"
        "heavy = {'nemo', 'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    begun = time.monotonic()
    rows = stage(tmp_path, ["hang", "hang ", "hang", "a"], Verifier(mine, seconds=2, workers=4, max_failure_rate=1))
    assert [row["score"] for row in rows] == [None, 5, None, 1] and time.monotonic() - begun < 20


def test_code_is_tested_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": "add", "tests": "assert add(1, 2) == 3"}) + "\n")
    texts = ["def add(a, b): return a + b", "def add(a, b): return 4", "import os; os._exit(0)", "x = '\ud83d'"]
    rows = [{"key": f"p/{i}", "response": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = judge_responses(
        str(tmp_path / "p.jsonl"),
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "j.jsonl"),
        Verifier(verifiers.python_tests),
    )
    assert [row["score"] for row in journal.read(output)] == [1, 0, 0, 0]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="isolation: bubblewrap was tried, and there is no `bwrap` on the PATH"):
        judge_responses(
            str(tmp_path / "p.jsonl"), str(tmp_path / "a.jsonl"), str(tmp_path / "k.jsonl"),
            Verifier(verifiers.python_tests, workers=1),
        )  # fmt: skip


def test_a_deeply_nested_response_is_no_json() -> None:
    assert verifiers.instructions({"instructions": [{"json": True}]}, "[" * 50000) == 0
    assert verifiers.instructions({"instructions": [{"json": False}]}, "[" * 50000) == 1
