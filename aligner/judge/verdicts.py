"""Parsing of comparisons: the winner of two judgments."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
MARKUP = str.maketrans("_", " ", "*`~\"'\u201c\u201d\u2018\u2019\xab\xbb$\\")


def _plain(text: str) -> str:
    """Remove markup and quotes; normalize dashes."""
    return unicodedata.normalize("NFKC", text).translate(DASHES).translate(MARKUP)


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
