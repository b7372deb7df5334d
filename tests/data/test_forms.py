"""Forms of published rows: recognized by their keys, read to the right pair, and nothing that judges is passed over."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from reading import read_rows, row_of

from aligner.common.errors import RowError
from aligner.data import sources
from aligner.data.forms.form import Options
from aligner.data.forms.table import FORMS, recognize
from aligner.data.rows import FormatCounts, PreferenceRow, ResponseRow

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))


def text(value: Any) -> str:
    return value if isinstance(value, str) else " | ".join(message["content"] for message in value)


def read(*rows: dict[str, Any], **options: Any) -> tuple[list[Any], FormatCounts]:
    lines, counts = [(json.dumps(row), f"f.jsonl:{i}") for i, row in enumerate(rows, start=1)], FormatCounts()
    return list(recognize(*lines[0], Options(**options)).rows(lines, counts)), counts


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_example_of_a_form_is_read_as_that_form(form: Any) -> None:
    examples = form.example if isinstance(form.example, list) else [form.example]
    assert recognize(json.dumps(examples[0]), "f.jsonl:1").name == form.name
    (row,), counts = read(*examples)
    assert not counts.dropped and not counts.left_out
    assert "2" in text(row.prompt)
    if isinstance(row, PreferenceRow):
        assert (text(row.chosen_response).strip(), text(row.rejected_response).strip()) == ("4", "5")
    else:
        assert isinstance(row, ResponseRow) and text(row.response) == "4" and row.desirable is not False


ULTRAFEEDBACK = {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}


@pytest.mark.parametrize(
    "row",
    [
        ULTRAFEEDBACK | {"prompt_id": "x", "messages": [USER, GOOD], "score_chosen": 8.0, "score_rejected": 3.0},
        ULTRAFEEDBACK | {"source": "x", "chosen-rating": 8, "chosen-model": "a", "rejected-rating": 3},
        {"source": "x", "instruction": "2 + 2?", "chosen_response": "4", "rejected_response": "5",
         "chosen_avg_rating": 8, "rejected_avg_rating": 3, "chosen_model": "a"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0, "score_rejected": 3.0},
    ],
)  # fmt: skip
def test_ultrafeedback_in_its_published_shapes_has_its_scores_as_rewards(row: dict[str, Any]) -> None:
    (pair,), _ = read(row)
    assert (text(pair.prompt), text(pair.chosen_response), text(pair.rejected_response)) == ("2 + 2?", "4", "5")
    assert (pair.chosen_reward, pair.rejected_reward) == (8.0, 3.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ULTRAFEEDBACK | {"messages": [USER, BAD]}, "'messages' is another conversation than that of 'chosen'"),
        (ULTRAFEEDBACK | {"prompt": "3 + 3?"}, "'prompt' is not in the conversation of 'chosen'"),
        (ULTRAFEEDBACK | {"question": "3 + 3?"}, "'question' is another text than 'prompt'"),
        (ULTRAFEEDBACK | {"score_chosen": 8.0}, "only one of score_chosen and score_rejected"),
        ({"messages": [USER, GOOD], "preference": True}, "has 'preference', which judges"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "'label' must be true or false"),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": "x"}, "must be a finite number"),
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "me"}, "'winner' must be one of model_a"),
        ({"chosen": "abc", "rejected": "xyz"}, "no beginning in common"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "have no message in common"),
        ({"text": "a"}, "is of no form that is read; expected .*; found the keys 'text'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}, "has 'images', which says something"),
    ],
)
def test_what_contradicts_itself_or_cannot_be_used_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"f.jsonl:1: .*{message}"):
        read(row)


def test_a_labeled_conversation_is_no_demonstration() -> None:
    (row,), _ = read({"messages": [USER, BAD], "label": False})
    assert row.desirable is False and text(row.response) == "5"


def test_dialogues_of_hh_rlhf() -> None:
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2 + 2?\n\nAssistant:"
    rows = [
        {"chosen": f"{begin} 4", "rejected": f"{begin} 5"},
        {"chosen": f"{begin} 4", "rejected": f"{begin} 4"},
        {"chosen": f"{begin} 4", "rejected": begin},
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: e\n\nHuman: f\n\nAssistant: g"},
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
    ]  # fmt: skip
    (pair,), counts = read(*rows)
    assert [m["role"] for m in pair.prompt] == ["user", "assistant", "user"]
    assert (text(pair.chosen_response), text(pair.rejected_response)) == ("4", "5")
    assert counts.dropped == {
        "with two equal answers": 1,
        "with an empty answer": 1,
        "with dialogues that differ before their last answer": 1,
        "with a dialogue that ends without an answer": 1,
    }


def test_the_prompt_of_two_texts_ends_with_their_last_whole_word_in_common() -> None:
    (pair,), _ = read({"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert (pair.prompt, pair.chosen_response, pair.rejected_response) == ("The sky is", " blue", " black")


def test_strength_says_which_is_better_and_ties_are_counted() -> None:
    rows = [{"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": s} for s in (-2, 0, 1)]
    pairs, counts = read(*rows)
    assert [pair.chosen_response for pair in pairs] == ["b", "c"] and counts.dropped == {"with a tie": 1}


@pytest.mark.parametrize(
    ("how", "expected"),
    [("best_worst", ["ad"]), ("neighbours", ["ab", "cd"]), ("all", ["ab", "ac", "ad", "bd", "cd"])],
)
def test_pairs_of_a_ranked_list(how: str, expected: list[str]) -> None:
    ranks = {"a": 0, "b": 1, "c": 1, "d": 2}
    completions = [{"rank": rank, "completion": [{"role": "assistant", "content": c}]} for c, rank in ranks.items()]
    pairs, _ = read({"context": [USER], "completions": completions}, ranked_pairs=how)
    assert [text(p.chosen_response) + text(p.rejected_response) for p in pairs] == expected


def test_attributes_pair_consecutive_rows_of_a_prompt(tmp_path: Path) -> None:
    def rated(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 4 - helpfulness}

    rows = [rated("a", "b", 1), rated("a", "c", 4), rated("d", "e", 2), rated("d", "f", 2), rated("g", "h", 3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (pair,) = read_rows(path)
    assert (pair.prompt, pair.chosen_response, pair.rejected_response, pair.source) == ("a", "c", "b", f"{path}:1")
    _, counts = read(*rows)
    assert counts.dropped == {"with a tie": 1, "with a single answer": 1}


def test_rows_that_belong_together_share_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 100)
    rows = [{"prompt": f"p{i // 4}", "response": f"r{i}", "helpfulness": i % 4} for i in range(32)]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    chunks = list(sources.chunks(path, together="prompt"))
    assert len(chunks) == 8 and all(len(chunk.lines) == 4 for chunk in chunks)
    assert [chunk.first for chunk in chunks] == list(range(1, 33, 4))


def test_a_form_is_held_to(tmp_path: Path) -> None:
    trl = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(
        RowError, match=r"f.jsonl:2: has no 'rejected', which the file's first row has \(preference, expl"
    ):
        read(trl, {"prompt": "a", "chosen": "b"})
    with pytest.raises(RowError, match=r"f.jsonl:2: has 'score', which judges"):
        read(trl, trl | {"score": 3})
    with pytest.raises(
        RowError, match=r"f.jsonl:2: is of the form 'conversation', and the file's first row of the form"
    ):
        read(trl, {"messages": [USER, GOOD]})
    pairs, counts = read(trl, trl | {"score": 3, "note": "x"}, ignore_columns=("score",))
    assert len(pairs) == 2 and counts.left_out == {"score": 1, "note": 1}


def test_sharegpt_with_calls() -> None:
    talk = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"at": "Bern"}}'},
        {"from": "observation", "value": "wet"},
        {"from": "gpt", "value": "It rains."},
    ]
    rows = row_of({"conversations": talk, "system": "Be brief.", "tools": '[{"name": "weather"}]'})
    assert [len(row.prompt) for row in rows] == [2, 4] and rows[0].template == {"tools": [{"name": "weather"}]}
    assert rows[0].response[0]["tool_calls"][0]["function"]["name"] == "weather"


def test_the_page_lists_every_form() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/data.md").read_text()
    for form in FORMS:
        assert f"| {form.name}: `{', '.join(sorted(form.needs))}` | {form.known_from} |" in page


def test_a_preview_names_the_form_and_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ULTRAFEEDBACK | {"prompt_id": str(i)}) + "\n" for i in range(3)))
    assert sources.preview(path, Options()) == f"{path}: preference, explicit prompt; left out: prompt_id"
    path.write_text(json.dumps(ULTRAFEEDBACK | {"quality": 1}) + "\n")
    with pytest.raises(RowError, match=r"rows.jsonl:1: has 'quality', which judges"):
        sources.preview(path, Options())


SYSTEM = {"role": "system", "content": "Be brief."}


def test_conversations_in_strings_are_conversations() -> None:
    row = {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD], indent=1)}
    (pair,), _ = read(row)
    assert (pair.prompt, pair.chosen_response, pair.rejected_response) == ([USER], [GOOD], [BAD])
    (pair,), _ = read({"prompt": "[1, 2] is a list", "chosen": "[3]", "rejected": '[{"no": "message"}]'})
    assert pair.rejected_response == '[{"no": "message"}]'


def test_a_system_column_stands_before_messages_of_either_kind() -> None:
    for talk in ([USER, GOOD], [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]):
        (row,), _ = read({"conversations": talk, "system": "Be brief."})
        assert row.prompt == [SYSTEM, USER] and row.response == [GOOD]
        begun = [SYSTEM if "role" in talk[0] else {"from": "system", "value": "x"}, *talk]
        with pytest.raises(RowError, match="has 'system' beside a system message"):
            read({"conversations": begun, "system": "Be brief."})


def test_answers_of_weight_0_are_no_targets_in_any_form() -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    more = [*talk, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d", "weight": 1}]
    (row,), _ = read({"conversations": more})
    assert text(row.response) == "d" and len(row.prompt) == 3
    for silent in ({"conversations": talk}, {"messages": [USER, {**GOOD, "weight": 0}]}):
        rows, counts = read(silent)
        assert not rows and counts.dropped == {"whose answers all have weight 0": 1}
    with pytest.raises(RowError, match="'chosen_response' has weight 0, so there is nothing to learn"):
        read({"prompt": [USER], "chosen_response": {**GOOD, "weight": 0}, "rejected_response": BAD})


@pytest.mark.parametrize(
    "key",
    ["is_safe", "harmfulness_label", "thumbs_up", "likes", "verdict", "judgement", "win", "elo", "stars", "score1",
     "qualityRating", "helpful", "evaluation", "Grades"],
)  # fmt: skip
def test_names_that_judge(key: str) -> None:
    with pytest.raises(RowError, match=f"has '{key}', which judges"):
        read({"prompt": "q", "response": "a", key: False})


def test_names_that_do_not_judge_are_left_out() -> None:
    names = ("id", "source", "prompt_id", "category", "chosen_model", "timestamp", "language", "topic", "turns")
    _, counts = read({"prompt": "q", "response": "a"} | dict.fromkeys(names, 1))
    assert set(counts.left_out) == set(names)


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
         {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "its values are not of the form 'dialogue'"),
        ({"messages": [USER, GOOD]}, {"foo": 1}, "has no 'messages'"),
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a"},
         {"prompt": "a", "response_a": "b", "response_b": "c"}, "its values are not of the form 'arena pairs'"),
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a"},
         {"prompt": "a", "response_a": "b", "response_b": "c", "winner": ["a"]}, "'winner' must be one of"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         {"conversations": [{"from": ["x"], "value": "a"}]}, r"expected 'from' \(one of"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
         {"chosen": "\n\nHuman: \ud83d\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
         "half of a character"),
    ],
)  # fmt: skip
def test_a_later_row_of_another_kind_is_told_with_its_line(first: Any, later: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"f.jsonl:2: .*{message}"):
        read(first, later)


def test_columns_of_published_ratings_that_say_more_are_known() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": -1, "preference_statement": "x",
         "preference_elaboration": "y", "three_most_similar_preferences": [], "all_preferences_unprocessed": []},
        {"context": [USER], "response1": "4", "response2": "5", "overall_preference": -1, "individual_preference": [],
         "domain": "general", "language": "english"},
        {"instruction": "a",
         "completions": [{"response": "b", "overall_score": 5}, {"response": "c", "overall_score": 1}],
         "models": ["x"], "correct_answers": ["None"], "incorrect_answers": ["None"], "source": "x"},
    ]  # fmt: skip
    for row in rows:
        assert len(read(row)[0]) == 1
