"""Judges: models behind a real server of OpenAI's protocol, functions that check, and what is wrong with either."""

import contextlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from serving import Reply

from aligner.common.errors import ConfigError, RowError
from aligner.data.prompts import PromptIndex
from aligner.generate import journal
from aligner.generate.engine import Engine, GenerationResult
from aligner.generate.generation import generate_responses
from aligner.generate.openai_engine import OpenAIEngine
from aligner.judge import templates, verifiers
from aligner.judge.iteration_report import IterationReport
from aligner.judge.judges import ModelJudge, Verifier, judge_responses
from aligner.judge.templates import as_text


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two prompts, and answers: one twice, one that did not end."""
    prompts = tmp_path / "prompts.jsonl"
    journal.write(
        prompts,
        [
            {"id": "p", "prompt": "2+2=", "answer": 4},
            {"id": "q", "prompt": [{"role": "user", "content": "3+3="}], "answer": 6},
        ],
    )
    rows = [
        ("p/0", "4", "stop"),
        ("p/1", "5", "stop"),
        ("p/2", "4", "stop"),
        ("p/3", "4 and", "length"),
        ("q/0", "6", "stop"),
    ]
    candidates = tmp_path / "candidates.jsonl"
    journal.write(
        candidates,
        [{"key": key, "response": text, "num_tokens": 1, "finish_reason": finish} for key, text, finish in rows],
    )
    return str(prompts), str(candidates)


def test_a_model_judges_what_ended_once_and_several_times(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    asked: list[str] = []

    def reply(request: dict[str, Any]) -> str:
        asked.append(request["messages"][0]["content"])
        return "Fine.\n\n**Score:** 5/5" if "\n4\n" in asked[-1] or "\n6\n" in asked[-1] else "No."

    judge = ModelJudge(OpenAIEngine(serve(reply), "judge"), num_judgments=2)
    output = judge_responses(*files, str(tmp_path / "j.jsonl"), judge)
    found = {row["key"]: row["score"] for row in journal.read(output)}
    assert found == {"p/0/0": 5, "p/0/1": 5, "p/1/0": None, "p/1/1": None, "q/0/0": 5, "q/0/1": 5}
    assert len(asked) == 6 and all("from 0 to 5" in text for text in asked)
    # Once more is no more.
    judge_responses(*files, str(tmp_path / "j.jsonl"), judge)
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "TookTooLong: did not end"),
        ("{{ prompt.nothing.at_all }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_told(
    serve: Any, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, told: str
) -> None:
    monkeypatch.setattr(templates, "TEMPLATE_S", 0.5)
    (tmp_path / "mine.jinja").write_text("{{ prompt }} {{ response }}" + body)
    judge = ModelJudge(OpenAIEngine(serve(lambda _: "4"), "judge"), template=str(tmp_path / "mine.jinja"))
    with pytest.raises(ConfigError, match=rf"judge.template: .*mine.jinja fails \({told}"):
        judge_responses(*files, str(tmp_path / "j.jsonl"), judge)


def test_a_servers_answers_are_kept_when_it_fails(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    count = iter(range(100))

    def reply(_: dict[str, Any]) -> Any:
        return "Score: 3" if next(count) < 3 else (400, {"error": {"message": "no more", "type": "x"}})

    url = serve(reply)
    judge = ModelJudge(OpenAIEngine(url, "judge", max_concurrent_requests=1, retries=0), num_judgments=2)
    pattern = (
        r"engine: http.*/v1 left \d of 6 requests without an answer, .* first answer \S+: BadRequestError: .*no more"
    )
    with pytest.raises(ConfigError, match=pattern):
        judge_responses(*files, str(tmp_path / "j.jsonl"), judge)
    kept = (tmp_path / "j.jsonl.parts/00000.jsonl").read_text().splitlines()
    assert len(kept) == 3
    count = iter(range(3))
    judge_responses(*files, str(tmp_path / "j.jsonl"), judge)
    assert len(list(journal.read(tmp_path / "j.jsonl"))) == 6


@pytest.mark.parametrize(
    ("reply", "settings", "message"),
    [
        (lambda _: b"<html>", {}, r"engine: .* first answer p/0: JSONDecodeError: "),
        (lambda _: b"{}", {}, r"engine: .* first answer p/0: BadReply: a reply without a choice"),
        (
            lambda _: time.sleep(3) or "late",
            {"timeout": 0.3},
            r"engine: .* first answer p/0: no answer within engine.timeout=0.3 s",
        ),
        (
            lambda _: (500, {"error": "broken"}),
            {},
            r"engine: .* first answer p/0: InternalServerError: .*broken.*run the same again",
        ),
        (lambda _: "Score: 1", {"model": "other"}, r"engine.model: .* has no 'other'; it has: judge"),
        (
            lambda _: "Score: 1",
            {"base_url": "http://127.0.0.1:9/v1"},
            r"engine.base_url: http://127.0.0.1:9/v1 cannot be reached",
        ),
        (
            lambda _: "Score: 1",
            {"api_key_env": "NO_SUCH_VARIABLE"},
            r"engine.api_key_env: the environment has no NO_SUCH_VARIABLE",
        ),
    ],
)
def test_a_server_that_does_not_serve(
    serve: Any, files: tuple[str, str], tmp_path: Path, reply: Reply, settings: dict[str, Any], message: str
) -> None:
    given = {"base_url": serve(reply), "model": "judge", "retries": 0, "max_concurrent_requests": 1} | settings
    with pytest.raises(ConfigError, match=message):
        judge_responses(*files, str(tmp_path / "j.jsonl"), ModelJudge(OpenAIEngine(**given), num_judgments=1))


def test_a_server_has_no_room_for_a_question(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    said = {"error": {"message": "This model's maximum context length is 10 tokens", "type": "invalid_request_error"}}
    output = judge_responses(
        *files,
        str(tmp_path / "j.jsonl"),
        ModelJudge(OpenAIEngine(serve(lambda _: (400, said)), "judge"), num_judgments=1),
    )
    assert {(row["finish_reason"], row["score"]) for row in journal.read(output)} == {("no_room", None)}


def test_a_server_generates(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    def reply(request: dict[str, Any]) -> str:
        assert request["max_tokens"] == 7 and request["stop"] == ["end"] and request["messages"][0]["role"] == "system"
        return str(request["seed"])

    engine = OpenAIEngine(serve(reply), "judge", system="Be brief.")
    rows = list(
        journal.read(
            generate_responses(
                files[0], str(tmp_path / "a.jsonl"), engine, num_generations=3, max_tokens=7, stop=["end"]
            )
        )
    )
    assert [row["key"] for row in rows] == ["p/0", "p/1", "p/2", "q/0", "q/1", "q/2"]
    assert len({row["response"] for row in rows}) == 6, "each its own seed"


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        (
            {},
            "Grade {{ prompt }}",
            r"judge.template: .*mine.jinja has no {{ response }}, so the judge would not see it",
        ),
        (
            {},
            "{{ prompt }} {{ response }} {{ goal }}",
            r"has {{ goal }}, which nothing fills in; there are: max_score, min_score, prompt, response",
        ),
        ({}, "{{ prompt }} {% if %}", r"judge.template: .*mine.jinja:1 is not a template"),
        ({"template": "nowhere"}, "", r"judge.template: 'nowhere' is neither a file nor one of additive, direct, meta"),
        ({"pattern": "Score: ("}, None, r"judge.pattern: 'Score: \(' is not a regular expression"),
        ({"pattern": "Score: 5"}, None, r"judge.pattern: 'Score: 5' has no group"),
        ({"num_judgments": 0}, None, r"judge.num_judgments: must be at least 1"),
        ({"min_score": 5, "max_score": 5}, None, r"judge.min_score, judge.max_score: 5 to 5 is no scale"),
        ({"top_p": 2.0}, None, r"top_p: must be above 0"),
    ],
)
def test_a_judge_that_cannot_be(
    files: tuple[str, str], tmp_path: Path, settings: dict[str, Any], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "mine.jinja").write_text(text)
        settings = {"template": str(tmp_path / "mine.jinja")} | settings
    with pytest.raises(ConfigError, match=message):
        judge_responses(
            *files, str(tmp_path / "j.jsonl"), ModelJudge(OpenAIEngine("http://127.0.0.1:9/v1", "judge"), **settings)
        )


def test_a_pattern_of_ones_own(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    judge = ModelJudge(
        OpenAIEngine(serve(lambda _: "worth <2> then <4>"), "judge"), num_judgments=1, pattern=r"<(\d+)>"
    )
    assert {row["score"] for row in journal.read(judge_responses(*files, str(tmp_path / "j.jsonl"), judge))} == {4.0}


def test_answers_of_other_prompts_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    journal.write(
        tmp_path / "candidates.jsonl", [{"key": "z/0", "response": "4", "num_tokens": 1, "finish_reason": "stop"}]
    )
    with pytest.raises(RowError, match=r"answers a prompt 'z', which .*prompts.jsonl does not hold; was it changed"):
        judge_responses(*files, str(tmp_path / "j.jsonl"), Verifier(verifiers.exact_match))


def test_a_function_judges(files: tuple[str, str], tmp_path: Path) -> None:
    output = judge_responses(
        *files, str(tmp_path / "j.jsonl"), Verifier(partial(verifiers.exact_match, field="answer"))
    )
    assert {row["key"]: row["score"] for row in journal.read(output)} == {"p/0/0": 1, "p/1/0": 0, "q/0/0": 1}
    with pytest.raises(RowError, match=r"prompts.jsonl:1: has no 'solution', which the verifier compares with"):
        judge_responses(*files, str(tmp_path / "k.jsonl"), Verifier(partial(verifiers.exact_match, field="solution")))


def test_a_conversation_is_shown_with_who_says_what() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert as_text(talk) == "User: a\n\nAssistant: b\n\nUser: c"
    assert as_text(talk[:1]) == as_text("a") == "a"


def test_a_judgment_is_held_to_a_schema_where_the_engine_can(
    serve: Any, files: tuple[str, str], tmp_path: Path
) -> None:
    def reply(request: dict[str, Any]) -> str:
        schema = request["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["score"] == {"type": "number", "minimum": 0, "maximum": 5}
        assert request["messages"][0]["content"].endswith('{"reasoning": "...", "score": ...}')
        return json.dumps({"reasoning": "A score: 5 would need more.", "score": 3})

    judge = ModelJudge(OpenAIEngine(serve(reply), "judge"), num_judgments=1)  # as it is by default
    rows = list(journal.read(judge_responses(*files, str(tmp_path / "j.jsonl"), judge)))
    assert [row["score"] for row in rows] == [3, 3, 3]
    from aligner.generate.megatron_engine import MegatronEngine

    for engine, form, told in (
        (MegatronEngine("model"), "json", "which MegatronEngine cannot hold a judgment to"),
        (MegatronEngine("model"), "xml", "'xml' is not one of text, json, choice"),
        (OpenAIEngine("http://127.0.0.1:9/v1", "judge"), "choice", "it has json, text"),
    ):
        with pytest.raises(ConfigError, match=told):
            judge_responses(*files, str(tmp_path / "k.jsonl"), ModelJudge(engine, response_format=form))  # type: ignore[arg-type]


def test_a_server_goes_on_with_a_message_and_gets_tools(serve: Any, tmp_path: Path) -> None:
    def reply(request: dict[str, Any]) -> str:
        assert request["continue_final_message"] is True and request["add_generation_prompt"] is False
        assert request["tools"] == [{"type": "function", "function": {"name": "f"}}]
        assert request["chat_template_kwargs"] == {"enable_thinking": False, "x": 1}
        return " five"

    prompt = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "It is"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    journal.write(tmp_path / "p.jsonl", [{"prompt": prompt, "tools": tools, "chat_template_kwargs": {"x": 1}}])
    engine = OpenAIEngine(serve(reply), "judge", chat_template_kwargs={"enable_thinking": False})
    (row,) = journal.read(generate_responses(str(tmp_path / "p.jsonl"), str(tmp_path / "a.jsonl"), engine, 1))
    assert row["response"] == " five"


def test_a_judgment_without_a_score_gets_a_last_line(files: tuple[str, str], tmp_path: Path) -> None:
    """By logits, where the engine can; what can be read stays, and so does a thought that does not end."""

    class Choosing(Engine):
        response_formats = ("choice", "text")

        @property
        def shard(self) -> tuple[int, int]:
            return 0, 1

        def describe(self) -> dict[str, Any]:
            return {}

        def session(self, cache: Path) -> Any:
            return contextlib.nullcontext()

        def too_long(self, questions: Any, sampling: Any) -> list[Any]:
            return []

        def generate(self, questions: Any, sampling: Any) -> Any:
            for i, q in enumerate(questions):
                said = ("Overall score: 8/10", "Score: 2", "<think>I begin")[i % 3]
                if q.choice and q.choice.lacking(said):
                    assert q.choice.options == ("0", "1", "2", "3", "4", "5")
                    said += q.choice.before + "4"
                    yield GenerationResult(key=q.key, text=said, num_tokens=3, finish_reason="stop", by_choice=True)
                else:
                    yield GenerationResult(key=q.key, text=said, num_tokens=3, finish_reason="stop")

    engine = Choosing()
    found = judge_responses(*files, str(tmp_path / "j.jsonl"), ModelJudge(engine, num_judgments=3))
    rows = list(journal.read(found))
    assert [row["score"] for row in rows] == [4, 2, None] * 3
    assert [row["by_choice"] for row in rows] == [True, False, True] * 3
    report = IterationReport()
    for row in rows:
        report.add_judgment(row)
    assert "6 of 9 judgments ended without a score, and got the likeliest one" in " ".join(report.warnings())
    text = ModelJudge(engine, num_judgments=3, response_format="text")
    found = judge_responses(*files, str(tmp_path / "t.jsonl"), text)
    assert [row["score"] for row in journal.read(found)] == [None, 2, None] * 3
    # Of a scale that is not of integers, and of a pattern, the text is read.
    hows: tuple[dict[str, Any], ...] = ({"max_score": 0.5}, {"pattern": "grade (.)"})
    for how in hows:
        assert ModelJudge(engine, **how)._format() == "text"
        with pytest.raises(ConfigError, match=r"judge\.response_format: choice, "):
            ModelJudge(engine, response_format="choice", **how).score(PromptIndex(*files), [], tmp_path / "x")
