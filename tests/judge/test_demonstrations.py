"""Rated responses as rows of the judging task, in the very words that a judge is asked with."""

import json
from pathlib import Path
from typing import Any

import pytest
from reading import read_rows

from aligner.common.errors import ConfigError, RowError
from aligner.generate import journal
from aligner.judge.demonstrations import judge_demonstrations
from aligner.judge.judges import ModelJudge
from aligner.judge.scores import parse_score

ASKED = {"prompt": "Why is the sky blue?", "response": "Air scatters blue light most."}


class Engine:
    """What a judge needs to know of one to write a prompt."""

    def __init__(self, *formats: str) -> None:
        self.response_formats = formats


def made(folder: Path, *rows: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "out.jsonl").unlink(missing_ok=True)
    return list(journal.read(judge_demonstrations(str(folder / "rated.jsonl"), str(folder / "out.jsonl"), **settings)))


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_prompt_is_the_judges_own_and_the_judgment_is_read_back(tmp_path: Path, form: Any, capfd: Any) -> None:
    rows = made(
        tmp_path,
        ASKED | {"score": 4, "reasoning": None, "judgment": None},
        ASKED | {"score": 3.5, "reasoning": "It names the cause."},
        ASKED | {"prompt": [{"role": "user", "content": "Why?"}], "judgment": '{"reasoning": "", "score": 2}', "id": 7},
        response_format=form,
    )  # fmt: skip
    judge = ModelJudge(Engine(form))  # type: ignore[arg-type]
    prompts = [ASKED["prompt"], ASKED["prompt"], "Why?"]
    assert [row["prompt"] for row in rows] == [judge.render_prompt(prompt, ASKED["response"]) for prompt in prompts]
    assert [parse_score(row["response"]) for row in rows] == [4, 3.5, 2]
    if form == "text":
        assert [row["response"] for row in rows[:2]] == ["Score: 4", "It names the cause.\n\nScore: 3.5"]
    assert "written: 3 demonstrations" in capfd.readouterr().out
    assert [row.response for row in read_rows(tmp_path / "out.jsonl")] == [row["response"] for row in rows]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "has neither 'judgment', a text that states its score, nor 'score'"),
        ({"score": 6}, "'score' must be from 0 to 5, found 6"),
        ({"score": True}, "'score' must be a number, found True"),
        ({"score": "4"}, "'score' must be a number, found '4'"),
        ({"judgment": "Good."}, "'judgment' states no score that can be read; it must end with one"),
        ({"judgment": "Score: 4", "score": 3}, "'judgment' states 4, and score is 3"),
        ({"judgment": "Score: 4", "reasoning": "a"}, "has 'judgment' and 'reasoning'"),
        ({"score": 4, "rating": 5}, "has 'rating', which is not read; a row has prompt, response, judgment, score"),
        ({"score": 4, "response": " "}, "'response' must be text"),
        ({"score": 4, "reasoning": 3}, "'reasoning' must be text, found 3"),
        ({"score": 4, "reasoning": 'So {"score": 2}'}, "'reasoning' states 2, and score is 4"),
        ({"score": 4, "reasoning": "<think>first"}, "'reasoning' states no score that can be read"),
    ],
)
def test_a_row_that_cannot_be_is_named(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=rf"rated\.jsonl:2: {message}"):
        made(tmp_path, ASKED | {"score": 1}, ASKED | more)
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"'judgment' is no JSON object, as response_format=json"):
        made(tmp_path, ASKED | {"judgment": "Score: 4"}, response_format="json")
    with pytest.raises(ConfigError, match="min_score, max_score: 5 to 5 is no scale"):
        made(tmp_path, ASKED | {"score": 5}, min_score=5)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RowError, match=r"empty\.jsonl"):
        judge_demonstrations(str(tmp_path / "empty.jsonl"), str(tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match="data: has weights"):
        judge_demonstrations([0.5, str(tmp_path / "rated.jsonl")], str(tmp_path / "out.jsonl"))  # type: ignore[list-item]
    made(tmp_path, ASKED | {"score": 5})
    with pytest.raises(ConfigError, match=r"output: .* exists already"):
        judge_demonstrations(str(tmp_path / "rated.jsonl"), str(tmp_path / "out.jsonl"))
