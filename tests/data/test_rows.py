import json
from pathlib import Path
from typing import Any

import pytest
from reading import read_rows

from aligner.common.errors import RowError
from aligner.data.forms.form import Options
from aligner.data.forms.table import recognize
from aligner.data.rows import FormatCounts, PreferenceRow

GOOD = {"prompt": "1+1=", "chosen_response": "2", "rejected_response": "3"}


def write(tmp_path: Path, *lines: str | dict, encoding: str = "utf-8") -> Path:
    path = tmp_path / "rows.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode(encoding))
    return path


def test_rows_are_read_with_their_place(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "2"}
    rows: Any = read_rows(
        write(
            tmp_path,
            GOOD | {"chosen_reward": 1, "rejected_reward": 0},
            "",
            GOOD | {"category": "sums", "chosen_reward": 4, "rejected_reward": 0.5},
            GOOD
            | {
                "prompt": [{"role": "user", "content": "1+1="}],
                "chosen_response": message,
                "chosen_reward": -1,
                "rejected_reward": -2.5,
            },
        )
    )
    assert [row.source.rsplit(":", 1)[1] for row in rows] == ["1", "3", "4"]
    assert (rows[1].chosen_reward, rows[1].rejected_reward) == (4.0, 0.5)
    assert rows[2].chosen_response == [message]


def test_a_byte_order_mark_carriage_returns_and_line_separators_are_no_trouble(tmp_path: Path) -> None:
    odd = GOOD | {"chosen_response": "two\u2028lines"}
    path = write(tmp_path, json.dumps(odd, ensure_ascii=False) + "\r", json.dumps(GOOD) + "\r", encoding="utf-8-sig")
    rows: Any = read_rows(path)
    assert [row.chosen_response for row in rows] == ["two\u2028lines", "2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"rows.jsonl:2: is not JSON"),
        ("[1, 2]", r"rows.jsonl:2: expected a JSON object"),
        ({"prompt": "x", "chosen_response": "y"}, r"rows.jsonl:2: has no 'rejected_response'"),
        (GOOD | {"chosen_response": "  "}, r"rows.jsonl:2: 'chosen_response' is empty"),
        (GOOD | {"prompt": ""}, r"rows.jsonl:2: 'prompt' is empty"),
        (GOOD | {"rejected_response": "2"}, r"rows.jsonl:2: chosen_response equals rejected_response"),
        (GOOD | {"prompt": 3}, r"rows.jsonl:2: 'prompt' must be a string or a list of messages"),
        (
            GOOD | {"prompt": [{"role": "robot", "content": "x"}]},
            r"rows.jsonl:2: prompt\[0\]: 'role' is 'robot'",
        ),
        (GOOD | {"prompt": [{"role": "user"}]}, r"rows.jsonl:2: prompt\[0\]: expected a message"),
        (GOOD | {"chosen_response": [{"role": "user", "content": "2"}]}, r"must be an assistant message, or several"),
        (GOOD | {"chosen_reward": 1.0}, r"rows.jsonl:2: only one of chosen_reward and rejected_reward"),
        (GOOD | {"chosen_reward": "high", "rejected_reward": 0}, r"'chosen_reward' must be a finite number"),
        (GOOD | {"chosen_reward": 1.0, "rejected_reward": 0}, r"1 of 2 rows have no chosen_reward and .*lines 1\)"),
        (
            {"prompt": "x", "response": "y"},
            r"2: is of the form 'single response', and the file's first row of .* 'pair'",
        ),
        ({"response": "y"}, r"rows.jsonl:2: has 'response', which says something"),
        ("[" * 100_000, r"rows.jsonl:2: is nested too deeply"),
        (json.dumps(GOOD)[:-20], r"rows.jsonl:2: is not JSON .*the line breaks off, as in a file that was cut"),
        (json.dumps(GOOD)[:-1], r"rows.jsonl:2: is not JSON .*the line breaks off"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, line: str | dict, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_rows(write(tmp_path, GOOD, line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "response": "y", "preference": "good"}, r"rows.jsonl:1: 'preference' must be 'chosen' or"),
        ({"prompt": "x", "response": ""}, r"rows.jsonl:1: 'response' is empty"),
        ({"response": "y"}, r"rows.jsonl:1: is of no form that is read"),
        ({"messages": [{"role": "user", "content": "x"}], "preference": "rejected"}, r"has 'preference', which judges"),
        ({"prompt": "x", "response": "y", "chosen_reward": 1}, r"has 'chosen_reward', which judges"),
        ({"messages": []}, r"rows.jsonl:1: 'messages' must be a string or a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"rows.jsonl:1: 'messages' has no assistant message"),
    ],
)
def test_a_bad_first_row_is_refused(tmp_path: Path, line: dict, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_rows(write(tmp_path, line))


def test_a_missing_an_empty_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(RowError, match="holds no rows"):
        read_rows(write(tmp_path, "", "  "))
    with pytest.raises(RowError, match=r"rows.jsonl:2: is not UTF-8"):
        read_rows(write(tmp_path, GOOD, GOOD | {"prompt": "Grüße"} and '{"prompt": "Grüße"}', encoding="latin-1"))


@pytest.mark.parametrize(
    "key", ["messages", "response", "preference", "helpfulness", "score", "qualityRating", "label"]
)
def test_a_key_that_judges_or_says_something_is_not_left_out(tmp_path: Path, key: str) -> None:
    with pytest.raises(RowError, match=f"rows.jsonl:2: has '{key}', which .* is not read in rows of the form 'pair'"):
        read_rows(write(tmp_path, GOOD, GOOD | {key: "odd"}))
    reader = recognize(json.dumps(GOOD), "rows.jsonl:1", Options(ignore_columns=(key,)))
    counts = FormatCounts()
    lines = [(json.dumps(row), "rows.jsonl:1") for row in (GOOD, GOOD | {key: "odd", "source": "web"})]
    assert all(isinstance(row, PreferenceRow) for row in reader.rows(lines, counts))
    assert counts.left_out == {key: 1, "source": 1}


def test_rows_that_lack_what_others_have_are_named(tmp_path: Path) -> None:
    """RPO would take 1 and 0 for them, which no one asked for."""
    rated = GOOD | {"chosen_reward": 3.0, "rejected_reward": 1.0}
    path = write(tmp_path, *[rated] * 3, *[GOOD] * 12, rated)
    with pytest.raises(RowError, match=r"12 of 16 rows have no .* \(lines 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, \.\.\.\)"):
        read_rows(path)
    judged = {"prompt": "x", "response": "y", "preference": "chosen"}
    path = write(tmp_path, judged, judged, {"prompt": "x", "response": "z"})
    with pytest.raises(RowError, match=r"1 of 3 rows have no preference \(lines 3\)"):
        read_rows(path)
