"""Reading what a judge wrote: a score, or which of two is better."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

KEYS = (
    r"(?:total|final|overall)\s+(?:score|points|rating|grade|marks?)|score|points|rating|grade|marks?"
    r"|punktzahl|bewertung|note|puntuaci[oó]n|puntaje|pontuaç[aã]o|nota|оценка|баллы?|评分|得分|分数|スコア|点数|점수"
)
"""How judges call a score, in some languages."""
FILLED = (
    r"(?:[^\w\n.+\-]|\n|\b(?:is|of|was|be|would|should|a|an|the|to|this|response|answer|equals|given|awarded|boxed)\b)"
)
"""What may stand between that and the number: marks, brackets, line breaks, a few words."""
NUMBER = r"-?\d+(?:[.,]\d+)?"
WORDS = {
    name: float(i)
    for i, name in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
STATED = re.compile(
    rf"(?<![^\W_])(?:{KEYS})(?![^\W_])"
    rf"(?:[\s:]*\([^)\n]{{0,40}}\))?(?:\s*(?:out of|on a scale of)\s*\d+(?:\s*(?:to|-)\s*\d+)?)?"
    rf"(?:{FILLED}|-(?=\s)){{0,12}}?"
    rf"(?P<number>{NUMBER}(?:\s*\+\s*{NUMBER})*(?:\s*=\s*{NUMBER})?|\b(?:{'|'.join(WORDS)})\b)"
    rf"(?=(?P<rest>[^\n]{{0,24}}))",
    re.IGNORECASE,
)
BARE = re.compile(rf"(?<![\w.,/])(?P<number>{NUMBER})(?P<rest>\s*(?:/|out of)\s*\d[^\n]{{0,12}})", re.IGNORECASE)
"""`4/5` alone; what follows says whether it is of this scale."""
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
MARKUP = str.maketrans("", "", "*_`~\"'\u201c\u201d\u2018\u2019\xab\xbb$\\")


def parse_score(text: str, *, low: float = 0, high: float = 5) -> float | None:
    """The score that a judge states last, or None if there is none that can be read.

    Takes what models write: `Score: 4`, `score:4`, `**Score:** 4/5`, `Score: <4>`, `Score: 4.5.`, `{"score": 4}`,
    `Total points: 1 + 1 + 1 = 3`, a bare `4/5`, digits of any script. The last one stated counts, also where it cannot
    be taken: outside `low` to `high`, of another scale (`8/10`, `80%`), or a range (`3-4`).
    """
    plain = _plain(text)
    stated = list(STATED.finditer(plain)) or list(BARE.finditer(plain))
    if not stated:
        return None
    number, rest = stated[-1]["number"].lower(), stated[-1]["rest"]
    scale = re.match(r"[\s\])>}]*(?:/|out of|von|de|sur)\s*(\d+)", rest, re.IGNORECASE)
    if (scale and float(scale[1]) != high) or re.match(r"\s*(?:%|-\s*\d|,\s*\d|(?:or|to)\s+\d)", rest):
        return None
    value = _value(number)
    return value if low <= value <= high else None


def _plain(text: str) -> str:
    """Without markup, quotes and kinds of dashes and digits."""
    return unicodedata.normalize("NFKC", text).translate(DASHES).translate(MARKUP)


def _value(number: str) -> float:
    if number in WORDS:
        return WORDS[number]
    total = number.rsplit("=", 1)[-1] if "=" in number else number
    return sum(float(part.strip().replace(",", ".")) for part in total.split("+"))


WINNER = re.compile(
    r"\b(?:winner|better|preferred|verdict|choice)\b\s*(?:is|:|=|-)?\s*[\[({<]*\s*"
    r"(?:judge?ment|judgment|response|answer|option|assistant)?\s*[\[({<]*\s*"
    r"(?P<name>[ab]\b|tie\b|both\b|neither\b|draw\b|equal\b)",
    re.IGNORECASE,
)
BOXED = re.compile(r"\[\[\s*(?P<name>[ABC])\s*\]\]")


def parse_winner(text: str) -> Literal["A", "B", "tie"] | None:
    """Which of two a judge prefers, as it states last; None if that cannot be read.

    Takes `Winner: Judgement A`, `**Winner:** [Judgment B]`, `winner is B.`, `[[A]]`; `tie` and the like are a tie.
    """
    plain = _plain(text)
    found = list(WINNER.finditer(plain)) or list(BOXED.finditer(plain))
    if not found:
        return None
    name = found[-1]["name"].upper()
    return "A" if name == "A" else "B" if name == "B" else "tie"
