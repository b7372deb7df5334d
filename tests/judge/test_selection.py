"""Tables of answers, worked by hand."""
# ruff: noqa: E501

from typing import Any

import pytest

from aligner.common.errors import ConfigError
from aligner.judge.selection import Candidate, best, select

# name, tokens, judgments, ended
Table = list[tuple[Any, ...]]


def candidates(table: Table) -> list[Candidate]:
    return [
        Candidate(key=name, text=name, length=length, scores=tuple(scores), ended=not left)
        for name, length, scores, *left in table
    ]


@pytest.mark.parametrize(
    ("table", "rho", "chosen", "rejected"),
    [
        ([("a", 9, [1]), ("b", 9, [4]), ("c", 9, [3])], 0, "b", "a"),
        # means: 3, 2.5
        ([("a", 9, [2, 4]), ("b", 9, [2, 3])], 0, "a", "b"),
        # both 4 and both 1: the judge was surer of b and of c (variances 1 and 0, 0 and 1)
        ([("a", 9, [3, 5]), ("b", 9, [4, 4]), ("c", 9, [1, 1]), ("d", 9, [0, 2])], 0, "b", "c"),
        # 0.1: chosen from 4.6 on, rejected up to 1.4; the shorter of 5 and 4.75, the longer of 1 and 1.25
        ([("a", 50, [5]), ("b", 20, [4.75]), ("c", 10, [4]), ("d", 20, [1]), ("e", 60, [1.25]), ("f", 90, [2])], 0.1, "b", "e"),
        ([("a", 50, [5]), ("b", 20, [4.75]), ("c", 10, [4]), ("d", 20, [1]), ("e", 60, [1.25])], 0, "a", "d"),
        # the bound itself: 0.2 of [0, 5] is 4
        ([("a", 50, [5]), ("b", 20, [4]), ("c", 10, [0])], 0.2, "b", "c"),
        # of equal length the better
        ([("a", 20, [4.9]), ("b", 20, [5]), ("c", 10, [0])], 0.2, "b", "c"),
        # what did not end or has no score is not there
        ([("a", 9, [5], "left out"), ("b", 9, [4]), ("c", 9, []), ("d", 9, [3])], 0, "b", "d"),
    ],
)  # fmt: skip
def test_pairs(table: Table, rho: float, chosen: str, rejected: str) -> None:
    found = select(candidates(table), length_control=rho)
    assert found.chosen and found.rejected and found.reason is None
    assert (found.chosen.key, found.rejected.key) == (chosen, rejected)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([], "unended"),
        ([("a", 9, [1])], "unended"),
        ([("a", 9, [1]), ("b", 9, [5], "left out")], "unended"),
        ([("a", 9, [1]), ("b", 9, [])], "unparsed"),
        ([("a", 9, [2]), ("b", 9, [2]), ("c", 9, [1, 3])], "tied"),
        ([("a", 9, [2]), ("a", 9, [3])], "identical"),
        # Equal but for the last bit of a mean.
        ([("a", 9, [0.1, 0.2, 0.3]), ("b", 9, [0.2, 0.2, 0.2])], "tied"),
    ],
)
def test_no_pair_has_a_reason(table: Table, reason: str) -> None:
    found = select(candidates(table))
    assert found.chosen is None and found.rejected is None and found.reason == reason


def test_the_same_answer_is_one_with_all_judgements() -> None:
    """Otherwise the luck of a judgment would make a text better than itself, or than another."""
    table = candidates([("a", 9, [5, 5]), ("a", 9, [1, 1]), ("b", 9, [4]), ("c", 9, [0])])
    found = select(table)
    assert found.chosen and found.chosen.key == "b"


@pytest.mark.parametrize("rho", [-0.1, 0.5, 1])
def test_a_band_that_holds_all_is_refused(rho: float) -> None:
    with pytest.raises(ConfigError, match=r"length_control: must be from 0 to below 0.5"):
        select([], length_control=rho)


def test_best_of_several() -> None:
    assert best([]) is None
    found = best(candidates([("a", 9, [4, 4]), ("b", 9, [3, 5]), ("c", 5, [5], "left out")]))
    assert found and found.key == "a"
