"""What judges write, as they write it."""
# ruff: noqa: E501, RUF001

import pytest

from aligner.judge.scores import parse_score
from aligner.judge.verdicts import parse_winner

SCORES: list[tuple[str, float | None]] = [
    # as asked for
    ("Score: 4", 4), ("The answer is fine.\n\nScore: 3", 3), ("Score: 0", 0), ("Score: 5", 5), ("Points: 2", 2),
    # as they write it
    ("score:4", 4), ("Score:4", 4), ("Score:  4", 4), ("SCORE: 4", 4), ("Score : 4", 4), ("Score = 4", 4),
    ("Score - 4", 4), ("Score – 4", 4), ("Score is 4", 4), ("a score of 4", 4), ("Score\n4", 4), ("## Score\n\n4", 4),
    ("**Score:** 4", 4), ("**Score: 4**", 4), ("**Score:** 4/5", 4), ("*Score*: 4", 4), ("__Score__: 4", 4),
    ("Score: <4>", 4), ("Score: [4]", 4), ("Score: (4)", 4), ("Score: {4}", 4), ("Score: `4`", 4), ('Score: "4"', 4),
    ('{"reason": "good", "score": 4}', 4), ("Score: $\\boxed{4}$", 4), ("<score>4</score>", 4), ("[Score: 4]", 4),
    ("Score: 4.", 4), ("Score: 4.5", 4.5), ("Score: 4.5.", 4.5), ("Score: 4,5", 4.5), ("Score: 4, because", 4),
    ("Score: 4/5", 4), ("Score: 4 / 5", 4), ("Score: 4 out of 5", 4), ("Score: <4>/5", 4), ("5/5", 5), ("I give it 3/5.", 3),
    ("4 out of 5", 4), ("Score (out of 5): 4", 4), ("Score (0-5): 4", 4), ("Score out of 5: 4", 4),
    ("Total score: 4", 4), ("Final Score: 4", 4), ("Overall rating: 4", 4), ("Total points: 4", 4), ("Rating: 4 stars", 4),
    ("Score: 1 + 1 + 1 = 3", 3), ("Score: 1+1+1", 3), ("Score: four", 4), ("The score should be 4.", 4),
    ("I would award this response a score of 4.", 4), ("Score: 4 points", 4), ("score\t:\t4", 4),
    # the last one counts
    ("Score: 1 for relevance.\nScore: 5", 5), ("Score: <total points>\n\nScore: 2", 2), ("score of 1 ... Score: 3/5", 3),
    ("Score: 3\n\nScore: 7", None),
    # what stands around it
    ("Score: 3 (the answer misses points 4 and 5)", 3), ("Score: 4\n\nNote: 1 point was deducted for brevity.", 4),
    ("Score: 3 points\n\n1. It is relevant", 3), ("Score: 4 out of 5 points\n\n1. foo", 4), ("Score: 4 = 1 + 1 + 1 + 1", 4),
    ("Score: 1 (relevance) + 1 (coverage) + 1 (core) = 3", 3), ("Score: 3\n\nPoints: 1 for relevance, 1 for style", 3),
    ("Score: 4. The explanation suits a grade 5 student.", 4), ("Score: 2\n\nTo reach a score of 5 the answer should", 2),
    ("Score: (4)\n\n2 criteria were missed", 4), ("Score: 4 on a scale of 10", None), ("Rating: 4 stars out of 10", None),
    ("Score: 4 on a scale of 1 to 5", 4), ('{"total_score": 4}', 4), ("overall_score: 4", 4), ("Note : 4/5", 4), ("Nota: 4", 4),
    ("Note: 1 point was deducted", None), ("Grade: 4", 4), ("Points: 2 of them", 2),
    # digits and words of others
    ("Score: ４", 4), ("Score： 4", 4), ("Score: ٤", 4), ("Score: ४", 4), ("评分：4", 4), ("得分: ４", 4), ("スコア：3", 3),
    ("점수: 4", 4), ("Punktzahl: 4", 4), ("Puntuación: 4", 4), ("Оценка: 4", 4),
    # from reports of others
    ('{"reasoning": "fine", "score": 3, "max_score": 5}', 3), ('{"score": 3, "max_score": 10}', None),
    ("Score: 4\nThis falls short of a perfect score: 5 would need sources.", 4),
    ("Overall score: 4\nRelevance score: 1\nClarity score: 2", 4), ("Relevance score: 1\nClarity score: 2", None),
    ("Score: 4 of 10 points", None), ("Score: 3 (on a 10-point scale)", None), ("Score: 4 (out of 10)", None),
    ("Score: 3 (out of 5)", 3), ("Score: 3 (on a 5-point scale)", 3), ("Score: 3 -> 4", None), ("Score: 3 → 4", None),
    ("4", 4), ("[[4]]", 4), ("4.", 4), ("分數：4", 4), ("الدرجة: ٤", 4), ("Total: 3/5", 3), ("Score: 4½", 4.5), ("Score: 4²", None),
    ("Confidence score: 5\nScore: 2", 2), ("Score: 2\nConfidence: 5", 2), ("Maximum score: 5\nScore: 3", 3),
    ("Score: 3\nMaximum score: 5", 3), ("<think>Perhaps a score: 4", None), ("<think>Score: 5</think>\nScore: 3", 3),
    ("I think of a score: 5\n</think>\nScore: 2", 2), ("A score of 2 would be for an answer that lacks it.", None),
    ('```json\n{"evaluation": {"score": 4}, "notes": {}}\n```', 4), ('{"score": "4/5"}', 4), ('{"score": null}', None),
    ('{"clarity": 2, "overall": 4, "score": 3}', 4), ('{"score": true}', None), ("Score: 1 + 1 = 3", None),
    ('{"scores": {"clarity": 1}}\nScore: 3', 3), ("A score of 3 is for weak answers. I give it a score of 4.", 4),
    ("Final score: 2\nScore: 5 is what it could have had", None), ("Score: 4..5", None), ("3/5 for style, 4/5 for content", None),
    ("Accuracy: 5\nHelpfulness: 4\nOverall: 4", 4), ("Score: 4 (maximum 10)", None), ("Score: ~4", None), ("Score: >4", None),
    ("Score: 5\n\nWait, it lacks X.\nRevised score: 3", 3), ("Previous score: 5\nScore: 2", 2), ("Score: 3 to 4", None),
    ("Overall: 3 issues found\nScore: 2", 2), ("Overall - 3 of the claims are false.\n\nScore: 1", 1),
    ("The response computes Total: 3, which is wrong.\nScore: 1", 1), ("In total: 4 apples. Score: 1", 1),
    ("Total: 5 criteria were checked.\nScore: 2", 2), ("Overall rating: 2\nUser's overall rating: 4", 2), ("Score:\n1. good\n2. bad", None),
    ("Score: ?\n1. The response is bad", None), ("Response A score: 4\nResponse B score: 2", None), ("Score: A=4, B=2", None),
    ('{"a":{"score":1},"b":{"score":5}}', None), ("Score: 1 point for relevance + 1 point for detail = 2", None), ("Score: 3⁄4", None),
    ("Final score: 2\nScore: 4", None), ("Final score: 4\nScore: 4", 4), ("Overall: 4 stars", 4), ("Total: 3 points", 3),
    # none that can be taken
    ("", None), ("No idea.", None), ("Score:", None), ("Score: <total points>", None), ("Score: N/A", None),
    ("Score: 6", None), ("Score: -1", None), ("Score: 8/10", None), ("Score: 80%", None), ("Score: 100", None),
    ("Score: 3-4", None), ("Score: 3 or 4", None), ("Score: 3, 4, 5", None), ("underscored 4", None),
    ("The response gets 1 point for relevance and 1 point for style.", None), ("9/10", None), ("on 2024-05-04", None),
]  # fmt: skip


def test_there_are_many() -> None:
    assert len(SCORES) >= 60


@pytest.mark.parametrize(("text", "score"), SCORES)
def test_scores(text: str, score: float | None) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Complete and polite.\nScore: 1", None), ("Let me think. A score of 2 would be for an answer that", None),
        ("It earns points 1 to 3.\nScore: 1 + 1", None), ("Score: 1\n", 1), ("Score: 7\nIt is complete and", 7),
        ('{"score": 1', None), ('{"score": 1}', 1), ("1", None),
    ],
)  # fmt: skip
def test_a_judgment_that_was_cut_has_no_number_at_its_end(text: str, score: float | None) -> None:
    assert parse_score(text, max_score=10, finished=False) == score


def test_a_text_without_end_is_read_in_time() -> None:
    """Linear: a judge that loops must not hold up the others."""
    assert parse_score("score (" * 20_000) is None
    assert parse_score("Score: 1 (" * 20_000) in (1, None)


def test_the_scale_is_the_callers() -> None:
    assert parse_score("Score: 1,000", max_score=2000) == 1000
    assert parse_score("Score: 8/10", max_score=10) == 8
    assert parse_score("Score: 0", min_score=1) is None
    assert parse_score("Score: -1", min_score=-1) == -1


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("Winner: Judgement A", "A"), ("Winner: Judgment B", "B"), ("winner: judgement b", "B"), ("Winner: A", "A"),
        ("**Winner:** Judgement A", "A"), ("Winner: [Judgement A]", "A"), ("Winner: [Judgement A | Judgement B]\nWinner: B", "B"),
        ("Winner: Judgement A.", "A"), ("The winner is B.", "B"), ("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"),
        ("Winner: tie", "tie"), ("Winner: A\n\nWinner: B", "B"), ("Winner: neither", "tie"), ("", None), ("Winner:", None),
        ("Winner: <A or B>", None), ("Winner: A/B", None), ("Winner: Judgement A | Judgement B", None), ("The winner is a tie.", "tie"),
        ("Winner: Judgement A and Judgement B are equal", None), ("Winner: a tie", "tie"), ("My verdict is a bit mixed", None),
        ("Judgement A is better: B misses the point", "A"), ("The better judgement is B.", "B"), ("Judgement B is the winner.", "B"),
        ("Winner: <A or B>\nWinner: B", "B"), ("Winner: <B>", "B"), ("Judgement A is better argued", None), ("Winner: Alice", None),
    ],
)  # fmt: skip
def test_winners(text: str, winner: str | None) -> None:
    assert parse_winner(text) == winner
