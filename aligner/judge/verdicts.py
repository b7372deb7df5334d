"""Parsing of judgments: a score, or the winner of a comparison."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

OTHERS = (
    r"punktzahl|bewertung|puntuaci[oó]n|puntaje|pontuaç[aã]o|оценка|баллы?|评分|得分|分数|スコア|点数|점수"
    # These words also mean a remark, so only a number may follow.
    r"|(?:note|nota)(?=\s*:\s*\d+(?:[.,]\d+)?(?:\s*/\s*\d+)?\s*$)"
)
"""Words for a score in other languages."""
NUMBER = r"-?\d+(?:[.,]\d+)?"
WORDS = {
    name: float(i)
    for i, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
SUM = rf"{NUMBER}(?:\s*\+\s*{NUMBER})*(?:\s*=\s*{NUMBER})?"
VALUE = rf"(?P<number>{SUM}|\b(?:{'|'.join(WORDS)})\b)(?=(?P<rest>[^\n]{{0,40}}))"
OF_A_SCALE = (
    r"(?:[\s:]*\([^)\n]*(?:out of|scale|max|/|-|\bto\b)[^)\n]*\))?"
    r"(?:\s*(?:out of|on a scale of|from)\s*\d+(?:\s*(?:to|-)\s*\d+)?)?"
)
"""A description of the scale between the word and the score."""
BEGINNING = r"(?<![^\W_])"
STATED = re.compile(
    rf"{BEGINNING}(?:(?:(?:total|final|overall)\s+)?(?:score|rating)s?|(?:total|final|overall)\s+(?:points|grade|marks?)"
    rf"|{OTHERS})"
    rf"(?![^\W\d]){OF_A_SCALE}\s*(?:[:=>]|-(?=\s)|\n)(?:[^\w\n.+\-]|\n|\bboxed\b){{0,8}}?{VALUE}",
    re.IGNORECASE | re.MULTILINE,
)
"""`Score: 4`: a word for the score, a sign, the number."""
SAID = re.compile(
    rf"{BEGINNING}(?:(?:score|rating)(?![^\W\d]){OF_A_SCALE}"
    r"(?:[^\w\n.+\-]|\b(?:is|of|was|be|would|should|a|an|the|to|this|response|answer|equals|given|awarded)\b){0,12}?"
    rf"|(?:points|grade|marks?)(?![^\W\d]){OF_A_SCALE}\s*(?:[:=]|is\b)\s*){VALUE}",
    re.IGNORECASE,
)
"""`a score of 4`, `Points: 4`: used if `STATED` does not match."""
BARE = re.compile(rf"(?<![\w.,/])(?P<number>{NUMBER})(?P<rest>\s*(?:/|out of)\s*\d[^\n]{{0,12}})", re.IGNORECASE)
"""`4/5` alone; the rest decides whether the scale is the expected one."""
SCALE = re.compile(
    r"[\s\])>}]*(?:\w+\s+)?(?:/|out of|on a scale (?:of|from)(?:\s*\d+\s*(?:to|-))?|von|de|sur)\s*(\d+)", re.IGNORECASE
)
NOT_ONE = re.compile(r"\s*(?:%|-\s*\d|,\s*\d|(?:or|to)\s+\d)")
"""Text after a number that makes it a percentage or a range."""
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
MARKUP = str.maketrans("_", " ", "*`~\"'\u201c\u201d\u2018\u2019\xab\xbb$\\")
ASIDE = re.compile(r"(?<=\d)\s*\([^()\d]*\)")
"""A remark after a number, as in `1 (relevance) + 1 (style)`."""


def parse_score(text: str, *, min_score: float = 0, max_score: float = 5) -> float | None:
    """Return the last score in a judgment, or None if it cannot be parsed.

    Accepted are `Score: 4`, `score:4`, `**Score:** 4/5`, `Score: <4>`, `Score: 4.5.`, `{"score": 4}` and
    `Total points: 1 + 1 + 1 = 3`, with digits of any script; without any of these, `a score of 4` or a bare `4/5`. Only
    the last score counts. The result is None if that score is outside `min_score` to `max_score`, has another scale
    (`8/10`, `80%`), or is a range (`3-4`).
    """
    plain = ASIDE.sub("", _plain(text))
    found_scores = next((matches for kind in (STATED, SAID, BARE) if (matches := list(kind.finditer(plain)))), None)
    if found_scores is None:
        return None
    number, rest = found_scores[-1]["number"].lower(), found_scores[-1]["rest"]
    scale = SCALE.match(rest)
    if (scale and float(scale[1]) != max_score) or NOT_ONE.match(rest):
        return None
    value = _value(number)
    return value if min_score <= value <= max_score else None


def _plain(text: str) -> str:
    """Remove markup and quotes; normalize dashes and digits."""
    return unicodedata.normalize("NFKC", text).translate(DASHES).translate(MARKUP)


def _value(number: str) -> float:
    if number in WORDS:
        return WORDS[number]
    first, _, last = number.partition("=")
    # `1 + 1 + 1 = 3` or `3 = 1 + 1 + 1`.
    total = last if last and "+" in first else first
    return sum(float(part.strip().replace(",", ".")) for part in total.split("+"))


NOUN = r"(?:judge?ment|response|answer|option|assistant)"
OPEN = r"[\[({<\s]*"
NAME = rf"(?:{NOUN}\s*{OPEN}(?P<named>[ab])|(?-i:(?P<name>[AB])))(?![^\W_])"
OTHER = rf"(?!{OPEN}[\])}}>]*\s*(?:or\b|and\b|/|\||,){OPEN}(?:{NOUN}\s*)?(?-i:[AB])\b)"
"""Excludes a text that names both, as when a judge repeats its instructions."""
WINNER = re.compile(
    rf"\b(?:(?:winner|verdict|choice)\s*(?:\bis\b|[:=]|-)|(?:better|preferred|best)\s+(?:{NOUN}\s*(?:\bis\b|[:=])|is\b))"
    rf"\s*{OPEN}(?:the\s+)?"
    rf"(?:{NAME}{OTHER}|(?:an?\s+)?(?P<tie>tie\b|both\b|neither\b|draw\b|equal\b))",
    re.IGNORECASE,
)
WINS = re.compile(
    rf"\b{NOUN}\s+(?-i:(?P<name>[AB]))\s+(?:wins|is\s+(?:clearly\s+)?(?:the\s+(?:winner|better(?:\s+{NOUN})?)|better|preferred))"
    r"\s*(?:[.:;,\n]|$)",
    re.IGNORECASE,
)
BOXED = re.compile(r"\[\[\s*(?P<name>[ABC])\s*\]\]")


def parse_winner(text: str) -> Literal["A", "B", "tie"] | None:
    """Return the last winner in a comparison, or None if it cannot be parsed.

    Accepted are `Winner: Judgment A`, `**Winner:** [Judgment B]`, `winner is B.`, `[[A]]`; `tie`, `both`, `neither`,
    `draw`, `equal` and `[[C]]` are a tie.
    """
    plain = _plain(text)
    verdicts = next((matches for kind in (WINNER, WINS, BOXED) if (matches := list(kind.finditer(plain)))), None)
    if verdicts is None:
        return None
    groups = verdicts[-1].groupdict()
    name = (groups.get("named") or groups.get("name") or "").upper()
    return "A" if name == "A" else "B" if name == "B" else "tie"
