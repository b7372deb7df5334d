"""Ratings worked by hand; pairs of judgments; the faults of NVIDIA's version (nemo_aligner.md, section 2.3)."""
# ruff: noqa: E501

import math
from collections import Counter
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from aligner import losses
from aligner.common.errors import ConfigError
from aligner.common.run_folder import read_metrics
from aligner.generate import journal
from aligner.generate.engine import Engine, GenerationResult
from aligner.judge.build_pairs import select_pairs
from aligner.judge.judges import ModelJudge
from aligner.judge.meta_judge import _balanced, meta_judge, report_of, stated_score
from aligner.judge.ratings import Bias, Comparison, bias, ratings
from aligner.judge.scores import parse_score, without_scores

EVEN = Bias(1, 1)


def both_ways(winner: int, loser: int) -> list[Comparison]:
    return [Comparison(winner, loser, "A"), Comparison(loser, winner, "B")]


def test_bias_is_counted_and_weighed_against() -> None:
    # The first place wins three of four: ω₁ = 1/4, ω₂ = 3/4 (arXiv 2407.19594, section 2.3).
    found = bias(
        [
            Comparison(0, 1, "A"),
            Comparison(1, 0, "A"),
            Comparison(0, 2, "A"),
            Comparison(2, 0, "B"),
            Comparison(1, 2, "tie"),
            Comparison(2, 1, None),
        ]
    )
    assert found == Bias(3, 1) and found.share == 0.75 and found.weights == (0.25, 0.75)
    assert Bias(0, 0).share == 0.5


def test_two_of_three_to_one() -> None:
    """0 beats 1 in three of four: P = 3/4, so the ratings differ by ln 3, less a little for the prior."""
    fought = [Comparison(0, 1, "A")] * 3 + [Comparison(0, 1, "B")]
    found = ratings(2, fought, EVEN)
    assert found and found[0] - found[1] == pytest.approx(math.log(3), abs=0.05)
    assert sum(found) == pytest.approx(0, abs=1e-9)


def test_a_consistent_order_is_found_and_finite() -> None:
    found = ratings(3, [*both_ways(0, 1), *both_ways(1, 2), *both_ways(0, 2)], EVEN)
    assert found and found[0] > found[1] > found[2] and max(map(abs, found)) < 10


@pytest.mark.parametrize(
    "fought",
    [
        [],
        [Comparison(0, 1, None), Comparison(1, 0, None)],  # upstream: ValueError from scikit-learn
        [Comparison(0, 1, "tie"), Comparison(1, 0, "tie")],
        [Comparison(0, 1, "A"), Comparison(1, 0, "A")],  # the place won, not the judgment
        [*both_ways(0, 1), *both_ways(1, 2), *both_ways(2, 0)],
    ],
)
def test_nothing_tells_them_apart(fought: list[Comparison]) -> None:
    assert ratings(3, fought, EVEN) is None


def test_one_strong_winner_and_a_tie_is_enough() -> None:
    """Upstream wants all ratings distinct and drops this."""
    found = ratings(3, [*both_ways(0, 1), *both_ways(0, 2), Comparison(1, 2, "tie"), Comparison(2, 1, "tie")], EVEN)
    assert found and found[0] > max(found[1], found[2]) and found[1] == pytest.approx(found[2])


class Scripted(Engine):
    """Answers by a function of the question."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply

    def describe(self) -> dict[str, Any]:
        return {"scripted": True}

    def session(self, cache: Path) -> Any:
        import contextlib

        return contextlib.nullcontext()

    @property
    def shard(self) -> tuple[int, int]:
        return 0, 1

    def too_long(self, questions: Any, sampling: Any) -> list[Any]:
        return []

    def generate(self, questions: Any, sampling: Any) -> Any:
        # Not in order: results are known by their key, where upstream credits them by position.
        for q in reversed(questions):
            yield GenerationResult(key=q.key, text=self.reply(q.prompt), num_tokens=5, finish_reason="stop")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    """Two prompts; of the first, answer 1 is disputed more than answer 0; nobody disputes the second's."""
    journal.write(tmp_path / "p.jsonl", [{"id": "p", "prompt": "2+2="}, {"id": "q", "prompt": "3+3="}])
    answers = [("p/0", "4"), ("p/1", "5"), ("q/0", "6")]
    journal.write(
        tmp_path / "c.jsonl",
        [{"key": key, "response": text, "num_tokens": 1, "finish_reason": "stop"} for key, text in answers],
    )
    judged = [
        ("p/0/0", 4, "good"), ("p/0/1", 5, "very good"), ("p/1/0", 5, "wise"), ("p/1/1", None, "no score"), ("p/1/2", 0, "foolish"),
        ("p/1/3", 0, "foolish"), ("p/1/4", 3, "so so"), ("q/0/0", 5, "a"), ("q/0/1", 5, "b"),
    ]  # fmt: skip
    journal.write(
        tmp_path / "j.jsonl",
        [{"key": key, "score": score, "judgment": text, "finish_reason": "stop"} for key, score, text in judged],
    )
    return str(tmp_path / "p.jsonl"), str(tmp_path / "c.jsonl"), str(tmp_path / "j.jsonl")


def by_wisdom(prompt: str) -> str:
    """Prefers `wise` to `so so` to `foolish`."""
    order = ["wise", "so so", "foolish"]
    shown = [prompt.split(f"<judgment {name}>\n")[1].split("\n")[0] for name in "AB"]
    return f"**Winner:** [Judgment {'A' if order.index(shown[0]) < order.index(shown[1]) else 'B'}]"


def test_the_best_judgment_is_chosen_over_the_worst(files: tuple[str, str, str], tmp_path: Path, capfd: Any) -> None:
    engine = Scripted(by_wisdom)
    output = meta_judge(*files, str(tmp_path / "m.jsonl"), engine, ModelJudge(engine), max_same_score_fraction=1.0)
    battles = list(journal.read(tmp_path / "m.jsonl.battles.jsonl"))
    # Three different judgments with scores, both ways round; the same words are one.
    assert [row["key"] for row in battles] == [f"p/1/{pair}" for pair in ("0-1", "0-2", "1-0", "1-2", "2-0", "2-1")]
    (row,) = journal.read(output)
    assert (row["chosen_response"], row["rejected_response"]) == ("wise", "foolish")
    assert row["metadata"]["scores"] == {"chosen": 5, "rejected": 0}
    assert (row["chosen_reward"], row["rejected_reward"]) == (5, 0), "points of the judge, as in pairs of responses"
    ratings = row["metadata"]["ratings"]
    assert ratings["chosen"] > ratings["rejected"]
    assert "2+2=" in row["prompt"] and "\n5\n" in row["prompt"] and "Score: <sum>" in row["prompt"]
    assert "the first place won 50% of 6" in capfd.readouterr().err
    assert report_of(output) == {"comparisons": 6, "unparsed_comparisons": 0, "first_position_win_rate": 0.5}


@pytest.mark.parametrize("reply", [lambda _: "I cannot say.", lambda _: "Winner: A"])
def test_no_verdict_and_a_verdict_for_the_place_make_no_pair(
    files: tuple[str, str, str], tmp_path: Path, reply: Any
) -> None:
    engine = Scripted(reply)
    assert list(journal.read(meta_judge(*files, str(tmp_path / "m.jsonl"), engine, ModelJudge(engine)))) == []


def by_score(prompt: str) -> str:
    """Prefers the judgment that states the higher score, as models do; none if no score is seen."""
    shown = [prompt.split(f"<judgment {name}>\n")[1].split("</judgment")[0] for name in "AB"]
    scores = [parse_score(text) for text in shown]
    if None in scores:
        return "No score is to be seen. Winner: tie"
    return f"Winner: {'A' if scores[0] > scores[1] else 'B'}"  # type: ignore[operator]


def with_stated_scores(files: tuple[str, str, str]) -> tuple[str, str, str]:
    rows = list(journal.read(Path(files[2])))
    for row in rows:
        row["judgment"] += f"\n\n**Score:** {row['score']}/5"
    journal.write(Path(files[2]), rows)
    return files


@pytest.mark.parametrize("show_scores", [False, True])
def test_the_meta_judge_compares_the_reasoning_alone(
    files: tuple[str, str, str], tmp_path: Path, show_scores: bool
) -> None:
    engine = Scripted(by_score)
    output = tmp_path / "m.jsonl"
    meta_judge(*with_stated_scores(files), str(output), engine, ModelJudge(engine), max_same_score_fraction=1.0, show_scores=show_scores)  # fmt: skip
    battles = list(journal.read(tmp_path / "m.jsonl.battles.jsonl"))
    assert [row["winner"] == "tie" for row in battles] == [not show_scores] * 6
    rows = list(journal.read(output))
    assert len(rows) == show_scores
    # What is trained on is the judgment as it was.
    assert all(row["chosen_response"] == "wise\n\n**Score:** 5/5" for row in rows)


@pytest.mark.parametrize(
    ("judgment", "shown"),
    [
        ("It names 3 rivers.\n\n**Score:** 4/5", "It names 3 rivers.\n\nScore: ?"),
        ("`x*y` is right.\nFinal score: **4**", "`x*y` is right.\nFinal score: ?"),
        ('{"reasoning": "all 4 of them", "score": 4}', '{"reasoning": "all 4 of them"}'),
        ('First.\n{"Overall Score": 4, "why": {"rating": 2, "text": "a"}}', 'First.\n{"why": {"text": "a"}}'),
        ("Total points: 1 + 1 + 1 = 3", "Total points: ?"),
        ("<think>relevance score: 1</think>\nSo 5/5", "<think>relevance score: ?</think>\nSo ?"),
        ("I would give it a score of 3, as 1969 is right.", "I would give it a score of ?, as 1969 is right."),
        ("4", "?"),
        ("Score: 1\n+ 1\n+ 1 = 3\nso it is.", "Score: ?\n\n\nso it is."),
        ("Score: 4\nout of 5", "Score: ?\n"),
        ("Score: {4}. It is good.", "Score: {?}. It is good."),
        ("Final score: \\boxed{4}\n\nIt is good.", "Final score: boxed{?}\n\nIt is good."),
        ('{"reasoning": "2 points are made. Score: 4", "score": 4}', '{"reasoning": "2 points are made. Score: ?"}'),
        ('{"parts": [{"score": 3, "of": "a"}], "relevance_score": 2, "score": 4}', '{"parts": [{"of": "a"}]}'),
        ("Punktzahl: 4", "Punktzahl: ?"),
        ("In 1969, {not JSON} 2+2=4.", "In 1969, {not JSON} 2+2=4."),
    ],
)
def test_stated_scores_are_hidden_and_nothing_else(judgment: str, shown: str) -> None:
    assert without_scores(judgment) == shown


def test_a_better_judgment_that_is_too_long_or_a_cut_off_one_makes_no_pair(
    files: tuple[str, str, str], tmp_path: Path, capfd: Any
) -> None:
    rows = [row | {"num_tokens": 10 + len(row["judgment"])} for row in journal.read(Path(files[2]))]
    engine = Scripted(by_wisdom)

    def pairs(name: str, **settings: Any) -> list[Any]:
        journal.write(tmp_path / f"{name}.j.jsonl", rows)
        given = (*files[:2], str(tmp_path / f"{name}.j.jsonl"), str(tmp_path / f"{name}.jsonl"))
        options: dict[str, Any] = {"max_same_score_fraction": 1.0} | settings
        return list(journal.read(meta_judge(*given, engine, ModelJudge(engine), **options)))

    assert len(pairs("whole", max_chosen_tokens=14)) == 1 and pairs("long", max_chosen_tokens=13) == []
    assert "1 dropped: the better one is too long" in capfd.readouterr().err
    rows = [row | {"finish_reason": "length" if row["judgment"] == "foolish" else "stop"} for row in rows]
    assert pairs("cut") == []
    assert "1 dropped: the worse one did not end" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"meta_judge.max_chosen_tokens: must be at least 1, found 0"):
        pairs("none", max_chosen_tokens=0)


def test_the_better_judgment_has_the_higher_reward_though_it_states_the_lower_score(
    files: tuple[str, str, str], tmp_path: Path
) -> None:
    engine = Scripted(lambda prompt: by_wisdom(prompt).translate(str.maketrans("AB", "BA")).replace("[Judgment", "["))
    (row,) = journal.read(
        meta_judge(*files, str(tmp_path / "m.jsonl"), engine, ModelJudge(engine), max_same_score_fraction=1.0)
    )
    assert (row["chosen_response"], row["rejected_response"]) == ("foolish", "wise")
    assert row["metadata"]["scores"] == {"chosen": 0, "rejected": 5}
    assert (row["chosen_reward"], row["rejected_reward"]) == (5, 0)


def test_reward_aware_losses_see_the_judges_points_in_rows_of_both_tasks(
    files: tuple[str, str, str], tmp_path: Path, tiny: Any, execute: Any
) -> None:
    engine = Scripted(by_wisdom)
    (tmp_path / "short.jinja").write_text("{{ prompt }} {{ response }} so:")
    judge = ModelJudge(engine, template=str(tmp_path / "short.jinja"))
    pairs = meta_judge(*files, str(tmp_path / "m.jsonl"), engine, judge, max_same_score_fraction=1.0)
    rows = select_pairs(*files, str(tmp_path / "t.jsonl"), judge_pairs=str(pairs), max_judge_pair_fraction=None)
    # 4 against 5, with mean scores 4.5 and 2; `wise` against `foolish`, which say 5 and 0.
    assert sorted((row["chosen_reward"], row["rejected_reward"]) for row in journal.read(rows)) == [(4.5, 2.0), (5, 0)]
    recipe = tiny("mixed", held_out=0)
    recipe.data.train, recipe.data.global_batch_size, recipe.data.micro_batch_size = str(rows), 2, 2
    recipe.loss, recipe.trainer.max_steps = run.Partial(losses.rpo_bwd_kl, beta=0.1, reward_scale=0.5), 1
    (row,) = read_metrics(execute(recipe) / "metrics.csv")
    wins = [1 / (1 + math.exp(-0.5 * gap)) for gap in (2.5, 5.0)]
    start = sum(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)) for p in wins) / 2
    assert row["train/loss"] == pytest.approx(start, rel=1e-5)
    assert (row["train/chosen_generated_rewards"], row["train/rejected_generated_rewards"]) == (4.75, 1.0)


def scored(score: float, **more: int) -> dict[str, Any]:
    return {"metadata": {"scores": {"chosen": score}}, **more}


def test_the_cap_on_a_score_is_a_cap() -> None:
    rows = [scored(score, n=i) for i, score in enumerate([5.0] * 20 + [4.0] * 3 + [3.0] * 3 + [1.0])]
    kept = _balanced(rows, 0.4)
    counts = [sum(stated_score(row) == score for row in kept) for score in (5, 4, 3, 1)]
    assert counts[1:] == [3, 3, 1] and counts[0] <= 0.4 * len(kept) and counts[0] == 4
    assert _balanced(rows, 1.0) and len(_balanced(rows, 1.0)) == len(rows)
    assert _balanced([scored(5.0)], 0.4) == []
    # Two scores cannot keep to 40 %: as many of each.
    two = [scored(score) for score in [5.0] * 20 + [4.0] * 3]
    assert Counter(map(stated_score, _balanced(two, 0.4))) == {4: 3, 5: 3}
