"""A file spoiled in every way: each fault is found, at its lines; a clean one has none."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from launching import nemo_each
from tokenizing import CHATML, byte_level

from aligner.lint.linter import Linter, Options, lint
from aligner.lint.page import page, text
from aligner.lint.row_table import COLUMNS
from aligner.lint.rules import RULES, LintReport

HHH = Path(__file__).parents[3] / "shared" / "data" / "hhh_preferences.jsonl"


@pytest.fixture(scope="module")
def hf() -> Any:
    return byte_level([("=", "4")], bos=True)


def clean(count: int, **more: Any) -> list[dict[str, Any]]:
    """Pairs without a fault, the chosen answer longer in half of them."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        answers = [
            "".join(draw.choice("abcdefgh ") for _ in range(n)).strip() + "." for n in draw.sample(range(9, 40), 2)
        ]
        rows.append(
            {"prompt": f"question {i}?", "chosen_response": answers[0], "rejected_response": answers[1], **more}
        )
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def found(report: LintReport) -> dict[str, list[int]]:
    return {f.name: [int(where.rpartition(":")[2]) for where in f.where] for f in report.findings}


def looked(path: Path, hf: Any, **options: Any) -> LintReport:
    (report,) = lint(str(path), hf, options=Options(**{"seq_length": 200, "global_batch_size": 8, **options}))
    return report


def test_a_clean_file_raises_no_alarm(tmp_path: Path, hf: Any) -> None:
    report = looked(write(tmp_path / "clean.jsonl", clean(300)), hf)
    assert (report.findings, report.errors) == ([], 0)
    assert report.numbers["rows"] == 300
    assert report.numbers["length_bias"]["accuracy_of_always_the_longer"] == pytest.approx(0.5, abs=0.1)


PAIR = {"prompt": "2+2=", "chosen_response": "four", "rejected_response": "five or so"}
LONG = "it is as it was and it will be as it is today"
SPOILED: dict[str, list[Any]] = {
    "unreadable": [
        "{not json",
        '{"prompt": "\\ud83d", "chosen_response": "a", "rejected_response": "b"}',
        json.dumps(PAIR | {"chosen_reward": 1})[:-1] + "0" * 5000 + "}",
        '{"prompt": 3, "chosen_response": "a", "rejected_response": "b"}',
    ],
    "empty": [PAIR | {"chosen_response": "  "}, PAIR | {"rejected_response": ""}],
    "same-answers": [PAIR | {"rejected_response": "four"}],
    "rewards": [PAIR | {"chosen_reward": 1}, PAIR | {"chosen_reward": "high", "rejected_reward": 0}],
    "contradiction": [
        {"prompt": "which?", "chosen_response": "this one", "rejected_response": "or that"},
        {"prompt": "Which? ", "chosen_response": "or that", "rejected_response": "this  one"},
    ],
    "duplicate": [PAIR, PAIR],
    "near-duplicate": [PAIR | {"prompt": "so?"}, PAIR | {"prompt": "So?", "chosen_response": "FOUR"}],
    "near-identical": [
        {"prompt": "hm?", "chosen_response": LONG, "rejected_response": LONG.replace("today", "toda")},
        {"prompt": "hm hm?", "chosen_response": "Paris", "rejected_response": "paris."},
    ],
    "merged-at-border": [{"prompt": "1+3=", "chosen_response": "4", "rejected_response": "5 is it"}],
    "doubled-bos": [PAIR | {"prompt": "<s><s>once"}],
    "doubled-eos": [
        PAIR | {"prompt": "end", "chosen_response": "yes</s></s>"},
        PAIR | {"prompt": "the end", "chosen_response": "yes</s>\n</s>\n"},
    ],
    "same-tokens": [{"prompt": "end?", "chosen_response": "ab", "rejected_response": "ab</s>"}],
    "nothing-visible": [
        PAIR | {"prompt": "so", "rejected_response": "</s>"},
        PAIR | {"prompt": "and", "chosen_response": "\u200b"},
    ],
    "role-marker": [
        PAIR | {"prompt": "who", "chosen_response": "me\n\nHuman: and you?"},
        PAIR | {"prompt": "who else", "rejected_response": "you [/INST] me"},
        PAIR | {"prompt": "who then", "rejected_response": "**Human:** a\n**AI:** b"},
    ],
    "special-token": [PAIR | {"prompt": "go on", "chosen_response": "one<|im_end|>two"}],
    "overlong": [PAIR | {"prompt": "long " * 60}],
}


@pytest.mark.parametrize("fault", SPOILED)
def test_every_fault_is_found_at_its_lines(tmp_path: Path, hf: Any, fault: str) -> None:
    rows = clean(100) + SPOILED[fault]
    lines = list(range(101, len(rows) + 1))
    if fault in ("duplicate", "near-duplicate"):
        lines = lines[1:]  # the first of them is no repetition
    report = looked(write(tmp_path / "spoiled.jsonl", rows), hf)
    assert found(report) == {fault: lines}
    assert (report.errors > 0) == (RULES[fault].severity == "error")


def test_an_answer_that_looks_like_a_speaker_is_none(tmp_path: Path, hf: Any) -> None:
    rows = clean(40)
    rows[0]["chosen_response"], rows[1]["rejected_response"] = (
        "Response: 404",
        "It is\nSystem: Windows 10" + "\n" * 40_000,
    )
    assert looked(write(tmp_path / "clean.jsonl", rows), hf, seq_length=50_000).findings == []


def test_files_that_a_run_would_refuse(tmp_path: Path, hf: Any) -> None:
    assert found(looked(write(tmp_path / "empty.jsonl", [" ", ""]), hf)) == {"no-rows": [1]}
    assert found(looked(write(tmp_path / "bad.jsonl", ["{", "["]), hf)) == {"unreadable": [1, 2]}
    few = write(tmp_path / "few.jsonl", clean(5))
    (finding,) = looked(few, hf).findings
    assert (finding.name, finding.count, finding.where) == ("too-few-rows", 5, [str(few)])
    # Of a global batch that nobody gave, it is no error yet.
    report = looked(few, hf, assumed_batch=True)
    assert report.errors == 0 and [one.name for one in report.findings] == ["few-rows"]
    pairs = write(tmp_path / "pairs.jsonl", clean(20))
    singles = write(tmp_path / "singles.jsonl", [{"prompt": f"s{i}", "response": "r"} for i in range(20)])
    options = Options(200, global_batch_size=8)
    _, report = lint(str(pairs), hf, options=options, validation=str(singles))
    assert list(found(report)) == ["mixed-splits"]
    # Each in a file of its own they go together, for kto or supervised fine-tuning.
    (report,) = lint([str(pairs), str(singles)], hf, options=options)
    assert report.findings == []


def test_every_answer_of_a_conversation_is_an_example(tmp_path: Path) -> None:
    hf = byte_level(chat_template=CHATML)
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(4)]
    numbers = looked(write(tmp_path / "talk.jsonl", [{"messages": talk}] * 9), hf).numbers
    assert (numbers["rows"], numbers["examples"], numbers["pairs"]) == (9, 18, 0)


def test_a_template_that_refuses_a_row_is_a_finding(tmp_path: Path) -> None:
    hf = byte_level(chat_template="{{ raise_exception('roles must alternate') }}")
    report = looked(write(tmp_path / "talk.jsonl", clean(1)), hf, apply_chat_template=True)
    assert found(report) == {"unreadable": [1]} and "roles must alternate" in report.findings[0].detail


@pytest.mark.parametrize(
    ("rows", "given", "micro", "advised"),
    [(30_000, 256, 8, 256), (3000, 256, 8, 16), (300, 256, 32, 32), (5, 256, 8, None)],
)
def test_the_advice_on_global_batches_can_be_followed(
    tmp_path: Path, rows: int, given: int, micro: int, advised: int | None
) -> None:
    table = pd.DataFrame({name: np.ones(rows, kind) for name, kind in COLUMNS.items()})
    report = LintReport("train", ["x"])
    Linter(report, table.assign(file=0), [tmp_path], Options(200, micro, given)).find([[]], None)
    assert report.numbers["global_batch"]["advised"] == advised


def test_faults_of_the_whole_file(tmp_path: Path, hf: Any) -> None:
    rated = clean(100, chosen_reward=2.0, rejected_reward=1.0)
    rated[3] |= {"rejected_reward": 2.0}
    rated[4] |= {"rejected_reward": 5.0}
    rated[5] = clean(6)[5]
    rated.append({"prompt": "a", "response": "b"})
    report = looked(write(tmp_path / "rated.jsonl", rated), hf)
    expected = {"missing-rewards": [6], "mixed-forms": [101], "tied-rewards": [4], "inverted-rewards": [5]}
    assert found(report) == expected
    assert report.numbers["reward_gap"]["p50"] == 1.0
    assert sum(report.histograms["reward gap"][0]) == 99

    judged = [{"prompt": f"q{i}", "response": "r", "preference": "chosen"} for i in range(9)]
    judged += [{"prompt": "q1", "response": "r", "preference": "rejected"}, {"prompt": "q99", "response": "r"}]
    report = looked(write(tmp_path / "judged.jsonl", judged), hf)
    assert found(report) == {"contradiction": [2, 10], "missing-preference": [11]}

    long = [row | {"prompt": row["prompt"] + "x" * 200} if i % 5 == 0 else row for i, row in enumerate(clean(100))]
    assert list(found(looked(write(tmp_path / "long.jsonl", long), hf))) == ["too-many-overlong"]

    biased = [dict(row, chosen_response=row["rejected_response"] + " and more") for row in clean(120)]
    report = looked(write(tmp_path / "biased.jsonl", biased), hf)
    assert list(found(report)) == ["length-bias"]
    assert "right in 100% of 120 pairs" in report.findings[0].detail


def test_prompts_shared_with_validation(tmp_path: Path, hf: Any) -> None:
    train = write(tmp_path / "train.jsonl", clean(50))
    valid = write(tmp_path / "valid.jsonl", [dict(clean(50)[7], prompt="QUESTION  7?"), PAIR])
    _, report = lint(str(train), hf, options=Options(200, global_batch_size=8), validation=str(valid))
    assert found(report) == {"split-leakage": [1]}


def test_figures_by_hand(tmp_path: Path, hf: Any) -> None:
    """Four pairs of one prompt token (and BOS) each, answers of 1 to 4 and 2 letters, each with its end."""
    rows = [
        {"prompt": p, "chosen_response": "c" * n, "rejected_response": "dd"}
        for p, n in zip("wxyz", (1, 2, 3, 4), strict=True)
    ]
    numbers = looked(
        write(tmp_path / "rows.jsonl", rows), hf, micro_batch_size=2, global_batch_size=4, seq_length=20
    ).numbers
    assert numbers["tokens"]["chosen"] == {"mean": 3.5, "p50": 3.5, "p90": 4.7, "max": 5.0}
    assert numbers["length_bias"]["accuracy_of_always_the_longer"] == (2 + 0.5) / 4
    # A sequence takes its tokens less one: 3, 4, 5, 6 for the chosen and 4 for each rejected.
    assert numbers["packing"]["examples_per_pack"] == 4.0 and numbers["packing"]["packed_sequence_size"] == 40
    assert numbers["packing"]["pack_fill"] == pytest.approx(34 / 40)


def test_the_page_stands_alone_and_shows_no_markup_of_the_data(tmp_path: Path, hf: Any) -> None:
    path = write(tmp_path / "<b>odd.jsonl", [*clean(100), *SPOILED["unreadable"]])
    report = looked(path, hf)
    html = page([report])
    assert "<b>odd" not in html and "&lt;b&gt;odd" in html
    assert html.count("<svg") == 2 and not re.search(r"<script|<link|<img|src=|url\(h", html)
    assert "ERROR: rows that cannot be read: 4 (3.8%)" in text(report)


@pytest.mark.skipif(not HHH.exists(), reason="shared data is not here")
def test_the_helpful_honest_harmless_pairs_have_no_errors(hf: Any) -> None:
    report = looked(HHH, hf, seq_length=8192)
    assert report.numbers["pairs"] == 163 and report.errors == 0
    # One pair differs in a name alone, which is what it is about.
    assert found(report) == {"near-identical": [130]}


def test_the_command_writes_and_tells_by_its_exit_code(tmp_path: Path, hf: Any) -> None:
    hf.save_pretrained(tmp_path / "tokenizer")
    files = {"good": (clean(20), 0), "bad": (clean(20) + SPOILED["empty"], 1)}
    command = [
        "llm",
        "lint-preferences",
        "-y",
        "seq_length=200",
        "global_batch_size=8",
        "tokenizer=tokenizer",
        "html=x.html",
    ]
    for name, (rows, _) in files.items():
        write(tmp_path / f"{name}.jsonl", rows)
    done = nemo_each([[*command, f"train={name}.jsonl", f"json={name}.json"] for name in files], tmp_path)
    for (code, said, error), (name, (rows, expected)) in zip(done, files.items(), strict=True):
        assert code == expected, error
        (report,) = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["rows"] == len(rows) and bool(report["findings"]) == (name == "bad")
        assert f"train: {name}.jsonl" in said and "written: x.html" in said


def test_one_side_one_prompt_and_texts_with_the_templates_own_tokens(tmp_path: Path, hf: Any) -> None:
    rows = [{"prompt": f"q{i}", "response": f"r{i}", "preference": i != 7} for i in range(30)]
    report = looked(write(tmp_path / "sided.jsonl", rows), hf)
    assert list(found(report)) == ["one-sided"]
    assert report.findings[0].detail == "29 chosen, 1 rejected; loss.undesirable_weight=29 balances them"
    rows = [{"prompt": "q", "response": f"r{i}", "preference": i % 2 == 0} for i in range(30)]
    assert list(found(looked(write(tmp_path / "one.jsonl", rows), hf))) == ["one-prompt"]

    chat = byte_level(chat_template=CHATML, bos=True)
    written = [{**PAIR, "prompt": f"<|im_start|>user\n{i}<|im_end|>\n<|im_start|>assistant\n"} for i in range(8)]
    path = write(tmp_path / "written.jsonl", written)
    report = looked(path, chat, apply_chat_template=True)
    assert found(report) == {"templated-prompt": list(range(1, 9))} and report.errors == 1
    # As text they are sound.
    assert "templated-prompt" not in found(looked(path, chat))
    # The tokenizer begins a text with BOS, its template does not.
    report = looked(write(tmp_path / "plain.jsonl", clean(40)), chat, apply_chat_template=True)
    assert found(report) == {"bos": [1]}


def test_the_form_and_what_is_left_out_stand_in_the_report(tmp_path: Path, hf: Any) -> None:
    rows = [
        {
            "source": "x",
            "chosen": f"\n\nHuman: q{i}\n\nAssistant: good {i}",
            "rejected": f"\n\nHuman: q{i}\n\nAssistant: bad",
        }
        for i in range(20)
    ]
    rows[3]["rejected"] = rows[3]["chosen"]
    chat = byte_level(chat_template=CHATML)
    report = looked(write(tmp_path / "hh.jsonl", rows), chat)
    assert report.numbers["forms"] == ["hh.jsonl: dialogue; columns left out: source (20 rows)"]
    assert found(report)["rows-left-out"] == [4] and report.errors == 0
