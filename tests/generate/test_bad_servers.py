"""Servers whose replies are bad: one reply costs a question at most, and what was answered is kept."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Raw, Reply, completion

from aligner.common.errors import ConfigError, RowError
from aligner.generate import journal, openai_engine
from aligner.generate.generation import generate_responses
from aligner.generate.openai_engine import OpenAIEngine

Serve = Callable[[Reply], str]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries that the server did not ask for are a hundredth of theirs."""
    real = openai_engine._seconds_until

    def seconds(response: Any, attempt: int) -> float:
        said = response is not None and response.headers.get("retry-after")
        return real(response, attempt) * (1 if said else 0.01)

    monkeypatch.setattr(openai_engine, "_seconds_until", seconds)


def prompts(folder: Path, count: int) -> str:
    journal.write(folder / "prompts.jsonl", [{"prompt": f"{i}+1="} for i in range(count)])
    return str(folder / "prompts.jsonl")


def ask(folder: Path, url: str, count: int, **settings: Any) -> list[dict[str, Any]]:
    engine = OpenAIEngine(url, "judge", **settings)
    output = generate_responses(prompts(folder, count), str(folder / "a.jsonl"), engine, num_generations=1)
    return list(journal.read(output))


def question(request: dict[str, Any]) -> int:
    return int(request["messages"][-1]["content"].partition("+")[0])


def cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


WHOLE = json.dumps(completion("an answer " * 5)).encode()
ONCE: dict[str, Any] = {
    "cut, of a valid length": Raw(cut(WHOLE)),
    "shorter than it says": Raw(cut(WHOLE), length=len(WHOLE)),
    "no body": Raw(b""),
    "a page of a proxy": Raw(b"<html>502 Bad Gateway</html>"),
    "nothing": Raw(b"", reset=True),
    "null": Raw(b"null"),
    "a number": Raw(b"3"),
    "a list": Raw(b"[]"),
    "no choice": (200, completion("", choices=[])),
    "choices that are null": (200, completion("", choices=None)),
    "no message": (200, completion("", choices=[{"index": 0, "finish_reason": "stop", "message": None}])),
    "a choice that is null": (200, completion("", choices=[None])),
    "choices by name": (200, completion("", choices={"a": 1})),
    "parts for a text": (200, completion([{"type": "text", "text": "x"}])),
    "half a character": Raw(json.dumps(completion("half \ud83d of it")).encode()),
    "bytes that are not UTF-8": Raw(WHOLE.replace(b"answer", b"an\xff\xfeer")),
    "busy": (429, {"error": {"message": "busy"}}),
    "broken": (500, {"error": {"message": "broken"}}),
    "away": Raw(b"upstream", code=503),
    "a time-out of a gateway": Raw(b"", code=504),
}


@pytest.mark.parametrize("bad", ONCE.values(), ids=ONCE.keys())
def test_a_bad_reply_is_asked_again(serve: Serve, tmp_path: Path, bad: Any) -> None:
    asked: Counter[int] = Counter()

    def reply(request: dict[str, Any]) -> Any:
        asked[question(request)] += 1
        return bad if question(request) == 1 and asked[1] < 3 else f"is {question(request) + 1}"

    rows = ask(tmp_path, serve(reply), 3)
    assert [row["response"] for row in rows] == ["is 1", "is 2", "is 3"]
    assert asked == {0: 1, 1: 3, 2: 1}


def ended_as(reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": ""}
    return completion("", choices=[{"index": 0, "finish_reason": reason, "message": message}])


ALWAYS: dict[str, tuple[Any, str]] = {
    "no choice": (ONCE["no choice"], "BadReply: a reply without a choice"),
    "half a character": (ONCE["half a character"], "BadReply: a text with half a character"),
    "broken": (ONCE["broken"], "InternalServerError: Error code: 500"),
    "refused": ((400, {"error": {"message": "content filter"}}), "BadRequestError: Error code: 400"),
    "filtered": ((200, ended_as("content_filter")), "BadReply: stopped by the server's content filter"),
}


@pytest.mark.parametrize(("bad", "reason"), ALWAYS.values(), ids=ALWAYS.keys())
def test_a_question_that_is_never_answered_is_one(
    serve: Serve, tmp_path: Path, capfd: Any, bad: Any, reason: str
) -> None:
    rows = ask(tmp_path, serve(lambda request: bad if question(request) == 7 else "fine"), 40, retries=2)
    assert [row["response"] for row in rows] == ["fine" if i != 7 else "" for i in range(40)]
    assert [i for i, row in enumerate(rows) if row["finish_reason"] == "failed"] == [7]
    assert rows[7]["error"].startswith(reason) and all("error" not in row for row in rows[:7])
    told = "".join(capfd.readouterr())
    assert "a.jsonl: 1 of 40 requests have no answer (failed): 1 x " in told and reason in told


def test_too_many_failures_end_a_stage_and_nothing_is_lost(serve: Serve, tmp_path: Path) -> None:
    asked: Counter[int] = Counter()
    down = True

    def reply(request: dict[str, Any]) -> Any:
        asked[question(request)] += 1
        return (500, {"error": "down"}) if down and question(request) >= 30 else "fine"

    url = serve(reply)
    with pytest.raises(
        ConfigError, match=r"left \d+ of 100 requests without an answer, .*max_failure_rate=0.05"
    ) as found:
        ask(tmp_path, url, 100, retries=1, max_concurrent_requests=8)
    assert "What was answered is kept; run the same again" in str(found.value)
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl.parts/00000.jsonl").read_text().splitlines()]
    assert len(kept) == 30 and {row["finish_reason"] for row in kept} == {"stop"}, "a failure is no row before the end"
    down = False
    assert len(ask(tmp_path, url, 100)) == 100
    assert all(asked[i] == 1 for i in range(30)), "nothing is asked twice"


def test_a_rerun_counts_failures_of_the_whole_stage(serve: Serve, tmp_path: Path) -> None:
    """60 of 1000 that are always refused are too many for 5 %, and few enough for 10 %, also in a second job."""
    url = serve(lambda request: (400, {"error": "no"}) if question(request) % 16 == 0 else "fine")
    with pytest.raises(ConfigError, match=r"left \d+ of 320 requests without an answer"):
        ask(tmp_path, url, 320)
    rows = ask(tmp_path, url, 320, max_failure_rate=0.1)
    assert sum(row["finish_reason"] == "failed" for row in rows) == 20


def test_a_reply_may_lack_its_count_and_reason(serve: Serve, tmp_path: Path) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}}
    url = serve(lambda _: (200, completion("fine", choices=[choice], usage={})))
    assert [(row["num_tokens"], row["finish_reason"]) for row in ask(tmp_path, url, 2)] == [(0, "stop")] * 2


def test_a_key_that_is_withdrawn_ends_a_stage_at_once(serve: Serve, tmp_path: Path) -> None:
    asked: Counter[int] = Counter()

    def reply(request: dict[str, Any]) -> Any:
        asked[question(request)] += 1
        return (401, {"error": {"message": "key is withdrawn"}}) if question(request) == 20 else "fine"

    with pytest.raises(ConfigError, match=r"engine: .* refuses .*prompts.jsonl:21: AuthenticationError: .*withdrawn"):
        ask(tmp_path, serve(reply), 100, max_concurrent_requests=4)
    kept = (tmp_path / "a.jsonl.parts/00000.jsonl").read_text().splitlines()
    assert len(kept) == len(asked) - 1, "all that was answered is kept"


@pytest.mark.parametrize("said", ["1", "date"])
def test_a_server_says_when_to_come_again(serve: Serve, tmp_path: Path, said: str) -> None:
    from email.utils import formatdate

    times: list[float] = []

    def reply(_: dict[str, Any]) -> Any:
        times.append(time.time())
        after = formatdate(time.time() + 2, usegmt=True) if said == "date" else said
        return Raw(b"{}", code=429, retry_after=after) if len(times) == 1 else "fine"

    assert ask(tmp_path, serve(reply), 1)[0]["response"] == "fine"
    assert 0.9 < times[1] - times[0] < 60


def test_a_quarter_of_bad_replies_costs_nothing(serve: Serve, tmp_path: Path) -> None:
    """1,000 questions, many at once; each of their answers is there once."""
    draw, answered = random.Random(1), Counter()
    bad = [value for name, value in ONCE.items() if name != "bytes that are not UTF-8"]

    def reply(request: dict[str, Any]) -> Any:
        if draw.random() < 0.25:
            return draw.choice(bad)
        answered[question(request)] += 1
        return f"is {question(request) + 1}"

    rows = ask(tmp_path, serve(reply), 1000, max_concurrent_requests=64, retries=12)
    assert [row["response"] for row in rows] == [f"is {i + 1}" for i in range(1000)]
    assert answered.total() == 1000


STRANGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a line again": (lambda row: row, r"has the key '\S+/0' of .*00000.jsonl:1; remove one of the two lines"),
    "a key of nobody": (lambda row: row | {"key": "zz/0"}, r"has the key 'zz/0', which no request of this job has"),
    "a key that is no text": (lambda row: row | {"key": 3}, r"has the key 3, which no request of this job has"),
    "no key": (lambda _: {"x": 1}, r"has no 'key'; found the keys 'x'"),
    "not a row": (lambda _: {"key": "4/0", "response": "x"}, r"has no 'prompt'; found the keys 'key', 'response'"),
    "a list": (lambda _: [1], r"expected a JSON object, found b'\[1\]"),
}


@pytest.mark.parametrize(("strange", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_a_row_that_cannot_be_is_named(
    serve: Serve, tmp_path: Path, strange: Callable[[Any], Any], message: str
) -> None:
    up = False
    url = serve(lambda request: "fine" if up or question(request) < 4 else (400, {"error": "no"}))
    with pytest.raises(ConfigError):
        ask(tmp_path, url, 8, max_concurrent_requests=1)
    part = tmp_path / "a.jsonl.parts/00000.jsonl"
    lines = part.read_text().splitlines()
    assert len(lines) == 4
    part.write_text("\n".join([*lines, json.dumps(strange(json.loads(lines[0])))]) + "\n")
    with pytest.raises(RowError, match=rf"{part}:5: {message}"):
        ask(tmp_path, url, 8)
    # As it says: without the line, it goes on.
    part.write_text("\n".join(lines) + "\n")
    up = True
    assert len(ask(tmp_path, url, 8)) == 8
