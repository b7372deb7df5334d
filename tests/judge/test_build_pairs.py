"""Rows from judged answers: pairs, demonstrations, and what is told of them."""

import json
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from aligner.common.errors import ConfigError, RowError, SanityCheckError
from aligner.generate import journal
from aligner.judge.build_pairs import best_responses, select_pairs, spin_pairs


def named(folder: Path) -> tuple[str, str, str]:
    """Prompts, candidates, judgments."""
    return str(folder / "p.jsonl"), str(folder / "c.jsonl"), str(folder / "j.jsonl")


def two_responses(folder: Path, prompts: int) -> None:
    """Two complete responses to each prompt."""
    journal.write(folder / "p.jsonl", [{"id": str(i), "prompt": f"{i}+1="} for i in range(prompts)])
    keys = [(f"{i}/{j}", str(j)) for i in range(prompts) for j in range(2)]
    journal.write(
        folder / "c.jsonl",
        [{"key": key, "response": text, "num_tokens": 1, "finish_reason": "stop"} for key, text in keys],
    )


def test_too_few_pairs_stop_the_run(tmp_path: Path) -> None:
    two_responses(tmp_path, 10)
    journal.write(tmp_path / "j.jsonl", [{"key": f"{i}/{j}/0", "score": 5} for i in range(10) for j in range(2)])
    files = named(tmp_path)
    with pytest.raises(
        SanityCheckError,
        match=r"0 of 10 prompts give a row, and one is needed at least: 10 have equal scores alone",
    ):
        select_pairs(*files, str(tmp_path / "t.jsonl"))
    told = json.loads((tmp_path / "t.jsonl.report.json").read_text())
    assert not (tmp_path / "t.jsonl").exists()
    assert any("highest score 100%" in text for text in told["warnings"]) and any(
        "few prompts" in text for text in told["warnings"]
    )


def test_judge_pairs_have_a_cap_that_is_one(tmp_path: Path) -> None:
    two_responses(tmp_path, 20)
    journal.write(
        tmp_path / "j.jsonl", [{"key": f"{i}/{j}/0", "score": 5 * (j and i < 17)} for i in range(20) for j in range(2)]
    )
    journal.write(
        tmp_path / "m.jsonl",
        [
            {
                "prompt": f"judge {i}",
                "chosen_response": "a",
                "rejected_response": "b",
                "chosen_reward": 1.0,
                "rejected_reward": 0.0,
            }
            for i in range(9)
        ],
    )
    files = named(tmp_path)
    rows = list(
        journal.read(
            select_pairs(
                *files, str(tmp_path / "t.jsonl"), judge_pairs=str(tmp_path / "m.jsonl"), max_judge_pair_fraction=0.15
            )
        )
    )
    judged = [row for row in rows if row["prompt"].startswith("judge")]
    # 3 of 20 is 15 %; bad prompts are dropped, not replaced.
    assert len(rows) == 20 and len(judged) == 3
    told = json.loads((tmp_path / "t.jsonl.report.json").read_text())["metrics"]
    assert (told["judge_pairs"], told["judge_pairs_left_out"], told["dropped_tied"]) == (3, 6, 3)


def test_spin_takes_the_given_answer_and_rejection_sampling_the_best(tmp_path: Path) -> None:
    prompts = [
        {"id": "a", "prompt": "1+1=", "response": "2"}, {"id": "b", "prompt": "2+2=", "response": "4"},
        {"id": "c", "messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]},
    ]  # fmt: skip
    journal.write(tmp_path / "p.jsonl", prompts)
    answers = [
        ("a/0", "2", "stop"),
        ("a/1", "5", "stop"),
        ("b/0", "4 or", "length"),
        ("b/1", "7 or", "length"),
        ("c/0", "9", "stop"),
        ("c/1", "8", "stop"),
    ]
    journal.write(
        tmp_path / "c.jsonl",
        [{"key": key, "response": text, "num_tokens": 1, "finish_reason": finish} for key, text, finish in answers],
    )
    rows = list(
        journal.read(spin_pairs(str(tmp_path / "p.jsonl"), str(tmp_path / "c.jsonl"), str(tmp_path / "s.jsonl")))
    )
    assert [(row["chosen_response"], row["rejected_response"]) for row in rows] == [("2", "5"), ("6", "9")]
    journal.write(
        tmp_path / "j.jsonl",
        [{"key": f"{key}/0", "score": score} for key, score in (("a/0", 1), ("a/1", 0), ("c/0", 0), ("c/1", 0.5))],
    )
    files = named(tmp_path)
    assert [row["response"] for row in journal.read(best_responses(*files, str(tmp_path / "b.jsonl")))] == ["2", "8"]
    assert [
        row["response"] for row in journal.read(best_responses(*files, str(tmp_path / "d.jsonl"), score_threshold=1.0))
    ] == ["2"]
    with pytest.raises(SanityCheckError, match=r"0 of 3 prompts give a row, .*2 have none that is good enough"):
        best_responses(*files, str(tmp_path / "e.jsonl"), score_threshold=2.0)
    journal.write(tmp_path / "p.jsonl", [{"id": "a", "prompt": "1+1="}, *prompts[1:]])
    with pytest.raises(RowError, match=r"p.jsonl:1: has no 'response' that spin could choose"):
        spin_pairs(str(tmp_path / "p.jsonl"), str(tmp_path / "c.jsonl"), str(tmp_path / "new.jsonl"))
    with pytest.raises(ConfigError, match=r"s.jsonl: was made of other prompts; remove it"):
        spin_pairs(str(tmp_path / "p.jsonl"), str(tmp_path / "c.jsonl"), str(tmp_path / "s.jsonl"))


def test_a_runs_weights_and_biases_show_the_round_that_made_its_rows(tiny: Any, execute: Any, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import WandbLogger

    journal.write(tmp_path / "p.jsonl", [{"id": str(i), "prompt": f"{i}+1="} for i in range(8)])
    answers = [(f"{i}/{j}", str(i + 1 + j)) for i in range(8) for j in range(2)]
    journal.write(
        tmp_path / "c.jsonl",
        [{"key": key, "response": text, "num_tokens": 2, "finish_reason": "stop"} for key, text in answers],
    )
    (tmp_path / "c.jsonl.speed.json").write_text('{"answers": 4.0, "tokens": 8.0}')
    journal.write(tmp_path / "j.jsonl", [{"key": f"{key}/0", "score": int(key.endswith("/0"))} for key, _ in answers])
    train = select_pairs(*named(tmp_path), str(tmp_path / "t.jsonl"))
    recipe = tiny()
    recipe.data.train, recipe.log.wandb = str(train), run.Config(WandbLogger, project="tests", offline=True)
    folder = execute(recipe)
    (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for name in (b"iteration/pairs", b"iteration/answers_per_second", b"train/loss"):
        assert name in written.read_bytes()
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/iteration/*.table.json")
    held = json.loads(table.read_text())
    assert held["columns"] == ["prompt", "role", "score", "deviation", "tokens", "ended", "text"]
    assert held["data"][:2] == [["0+1=", "chosen", 1, 0, 2, True, "1"], ["0+1=", "rejected", 0, 0, 2, True, "2"]]
    assert len(held["data"]) == 16
