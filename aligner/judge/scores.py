"""Parsing of a judgment's score. What is unsure is None, never a guess.

The readings, the first that finds one decides:

    an object      {"score": 4}, by its keys
    a statement    Score: 4, Overall rating: 4/5; a final one before others, the last before earlier ones
    a sentence     a score of 4
    a number       4, [[4]] or 4/5 alone

Scores of parts, maxima, confidences and examples (`relevance score`, `a perfect score`) are no scores.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OTHERS = (
    r"punktzahl|gesamtpunktzahl|bewertung|puntuaci[oó]n|puntaje|pontuaç[aã]o|оценка|баллы?|评分|評分|得分|分数|分數"
    r"|总分|總分|スコア|点数|點數|評価|점수|평점|الدرجة|درجة|النتيجة|التقييم|स्कोर|คะแนน|điểm(?: số)?|puan|poäng"
    r"|wynik|ocena|βαθμός|skor"
    # These words also mean a remark, so only a number may follow.
    r"|(?:note|nota|punteggio)(?=\s*:\s*\d+(?:[.,]\d+)?(?:\s*/\s*\d+)?\s*$)"
)
"""Words for a score in other languages."""
NUMBER = r"-?\d+(?:[.,]\d+)?"
WORDS = {
    name: float(i)
    for i, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
SUM = rf"{NUMBER}(?:\s*\+\s*{NUMBER})*(?:\s*=\s*{NUMBER}(?:\s*\+\s*{NUMBER})*)?"
VALUE = rf"(?P<number>{SUM}|\b(?:{'|'.join(WORDS)})\b)(?P<rest>[^\n]*)"
SCALE_BEFORE = (
    r"(?P<before>(?:[\s:]{0,3}\([^()\n]{0,60}(?:out of|scale|max|/|-|\bto\b)[^()\n]{0,60}\))?"
    r"(?:\s*(?:out of|on a scale of|from)\s*\d+(?:\s*(?:to|-)\s*\d+)?)?)"
)
"""A description of the scale between the word and the score."""
QUALIFIER = r"(?P<qualifier>(?:[^\W\d_][\w'-]*[ \t]+){0,4})"
"""Words before the word for a score, which say what it is a score of."""
FINAL = {"final", "total", "overall", "combined", "aggregate", "revised", "updated", "corrected", "adjusted"}
PLAIN = {
    "", "the", "my", "a", "an", "this", "your", "its", "response", "answer", "judge", "judges", "assigned", "awarded",
    "given", "additive", "numeric", "numerical", "integer", "is", "therefore", "so", "thus", "and", "hence", "quality",
    "evaluation", "assessment",
}  # fmt: skip
NAMED = ("response", "answer", "assistant", "model", "option")
"""Words before the letter of one of two responses, as in `Response A score`."""
BARE_FINAL = {"total", "overall"}
"""Words that are final scores where a number stands alone after them."""
WEAK = {"points", "grade", "mark", "marks"}
"""Words that may also be about a part; used if there is no other."""
STATED = re.compile(
    rf"(?<![^\W_]){QUALIFIER}(?P<word>(?:score|rating)s?|points|grade|marks?|total|overall|{OTHERS})(?![^\W\d]){SCALE_BEFORE}"
    rf"\s*(?P<sign>[:=>]|-(?=\s)|\n)(?:[^\w\n.+\-]|\n|\bboxed\b){{0,8}}?{VALUE}",
    re.IGNORECASE | re.MULTILINE,
)
"""`Score: 4`: a word for the score, a sign, the number."""
SAID = re.compile(
    rf"(?<![^\W_]){QUALIFIER}(?:(?P<word>score|rating)(?![^\W\d]){SCALE_BEFORE}"
    r"(?:[^\w\n.+\-]|\b(?:is|of|was|be|would|should|a|an|the|to|this|response|answer|equals|given|awarded)\b){0,12}?"
    rf"|(?:points|grade|marks?)(?![^\W\d])\s*(?:[:=]|is\b)\s*){VALUE}",
    re.IGNORECASE,
)
"""`a score of 4`: used if nothing is stated."""
BARE = re.compile(rf"(?<![\w.,/])(?P<number>{NUMBER})(?P<rest>\s*(?:/|out of)\s*\d[^\n]{{0,12}})", re.IGNORECASE)
"""`4/5` in a text."""
ALONE = re.compile(rf"[\s\[({{<]*(?P<number>{NUMBER})(?P<rest>[\s\])}}>.]*(?:(?:/|out of)\s*\d+[\s\])}}>.]*)?)\Z")
SCALE = re.compile(
    r"[\s\])>}(,]*(?:\w+\s+){0,2}?(?:/|out of|of|in|max\w*(?: of)?|on (?:an?|the) scale (?:of|from|to)?"
    r"(?:\s*\d+\s*(?:to|-))?|on an?|von|de|sur)\s*(?P<scale>\d+)"
    r"(?!\s*(?:criteria|aspects|points? (?:above|are|were|for)))",
    re.IGNORECASE,
)
"""The scale after a number: `/5`, `out of 5`, `of 10 points`, `(on a 10-point scale)`."""
UNSURE = re.compile(
    r"\s*(?:%|percent\b|-\s*\d|,\s*\d|(?:or|to)\s+\d|-?>\s*\d|[^\w\s]?\u2192|\^|\+|\.\.+\s*\d|~\s*\d"
    r"|[^\n]{0,80}?[=\u00d7]\s*\d|\s+(?:minus|plus|times)\b)"
)
"""Text after a number that makes it a percentage, a range, a change, a power or a term."""
LISTED = re.compile(r"\s*[.)=]\s*[^\W\d]")
"""Text after a number that begins a line as an item of a list: `1. It is relevant`."""
ENDS = re.compile(
    r"[\s\])>}.,;!]*(?:(?:/|out of|of)\s*\d+|points?|stars?|\([^()\n]{0,60}\)|-[^\d\n]*)?[\s\])>}.,;!]*\Z",
    re.IGNORECASE,
)
"""Text after a number that is nothing but a scale."""
SUPPOSED = re.compile(
    r"\s*[)\]]?\s*(?:would|could|might|may|should|requires?|needs?|means?|is\s+(?:for|reserved|given|awarded|when|only|appropriate)"
    r"|for\s+(?:an?|answers|responses|those)\b|if\b|when\b)",
    re.IGNORECASE,
)
"""Text after a number that makes it an example."""
KEYS = (
    (
        "final_score",
        "overall_score",
        "total_score",
        "final_rating",
        "overall_rating",
        "total_rating",
        "overall",
        "total",
    ),
    ("score", "rating", "total", "grade", "points", "mark", "value"),
)
"""Keys of an object with a score, those that say most first."""
LIMITS = ("max_score", "maximum_score", "max", "maximum", "out_of", "scale", "max_rating", "max_points")
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
MARKUP = str.maketrans("_", " ", "*`\"'\u201c\u201d\u2018\u2019\xab\xbb$\\")
ASIDE = re.compile(r"(?<=\d)\s*\([^()\d]{0,80}\)(?=\s*\+|\s*=)")
"""A remark after a summand, as in `1 (relevance) + 1 (style)`."""
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>", re.IGNORECASE)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    def checked(self, value: float | None) -> float | None:
        return value if value is not None and self.low <= value <= self.high else None


def parse_score(text: str, *, min_score: float = 0, max_score: float = 5, finished: bool = True) -> float | None:
    """Return the score of a judgment; None if there is none, or if it is unsure which one it is.

    Accepted are `Score: 4`, `**Overall score:** 4/5`, `Score: <4>`, `{"score": 4}`, `Total points: 1 + 1 + 1 = 3`, with
    digits of any script; without any of these, `a score of 4`, or `4` and `4/5` alone. The result is None if that score
    is outside `min_score` to `max_score`, has another scale (`8/10`, `80%`), is a range (`3-4`), or stands in a thought
    that does not end.

    Args:
        text: the judgment.
        min_score: lowest score.
        max_score: highest score.
        finished: whether the judgment came to its end; otherwise a number at the end of the text may be half of one.
    """
    scale = _Scale(min_score, max_score)
    said = after_thought(text)
    if said is None:
        return None
    found, value = _from_object(said, scale)
    if found:
        return value
    plain = ASIDE.sub("", _plain(said))
    statements = [s for s in _matches(STATED, plain) if finished or "\n" in plain[s.end() :]]
    for of_kind in (FINAL, PLAIN, WEAK):
        matches = [match for match in statements if _kind(match) is of_kind]
        if not matches:
            continue
        value = _value_of(matches[-1], scale)
        # A plain statement after the final one, and another value: which of them is meant?
        later = [m for m in statements if _kind(m) is PLAIN and m.start() > matches[-1].start()]
        if of_kind is FINAL and later and _value_of(later[-1], scale) != value:
            return None
        return value
    if not finished or any(_kind(match) is None for match in statements):
        return None
    sentences = [match for match in _matches(SAID, plain) if _kind(match) is not None]
    if sentences:
        return _value_of(sentences[-1], scale)
    alone = ALONE.match(plain)
    if alone:
        return _value_of(alone, scale)
    bare = {_value_of(match, scale) for match in BARE.finditer(plain)}
    return bare.pop() if len(bare) == 1 else None


HIDDEN = "?"
"""Stands for a score that is not shown."""
OF_SCORE = re.compile(r"(?:.*[\W_])?(?:score|rating|total|overall|grade|points|mark)s?|value")
"""Keys of an object that hold a score, also of a part."""
OUT_OF = re.compile(r"\s*(?:/|out of)\s*\d+", re.IGNORECASE)


def without_scores(text: str) -> str:
    """Return a judgment with every stated score hidden, also of parts, as `Score: ?`; objects lose the keys of a score.

    Other numbers stay. A line with a hidden score loses its markup.
    """
    decoder, parts, at, begin = json.JSONDecoder(), [], 0, text.find("{")
    while begin >= 0:
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            value, end = None, begin + 1
        if isinstance(value, dict):
            kept = _without_keys(value)
            shown = json.dumps(kept, ensure_ascii=False) if kept != value else text[begin:end]
            parts, at = [*parts, _hidden(text[at:begin]), shown], end
        begin = text.find("{", end)
    return "".join([*parts, _hidden(text[at:])])


def _without_keys(item: Any) -> Any:
    """Return a part of an object without scores: of keys, and stated in its texts."""
    if isinstance(item, str):
        return _hidden(item) if not item.strip().isdigit() else item
    if isinstance(item, list):
        return [_without_keys(value) for value in item]
    if not isinstance(item, dict):
        return item
    return {key: _without_keys(value) for key, value in item.items() if not OF_SCORE.fullmatch(key.strip().lower())}


def _hidden(text: str) -> str:
    # Lines of the two texts stand for each other: no step adds or removes a line break.
    plain = _plain(text)
    spans = {match.span("number") for pattern in (STATED, SAID) for match in _matches(pattern, plain)}
    spans |= {match.span("number") for match in BARE.finditer(plain)}
    alone = ALONE.match(plain)
    spans |= {alone.span("number")} if alone else set()
    masked, last = [], 0
    for begin, end in sorted(spans):
        if begin >= last:
            scale = OUT_OF.match(plain, end)
            end = scale.end() if scale else end
            masked += [plain[last:begin], HIDDEN, "\n" * plain[begin:end].count("\n")]
            last = end
    lines = "".join([*masked, plain[last:]]).split("\n")
    shown = zip(text.split("\n"), plain.split("\n"), lines, strict=True)
    return "\n".join(line if before == after else after for line, before, after in shown)


def after_thought(text: str) -> str | None:
    """Return what follows a judgment's thought; None if the thought does not end."""
    begun = [match[1].lower() for match in THOUGHT.finditer(text)]
    if not begun:
        # A template may have opened it: what ends it is seen alone.
        parts = re.split(r"</(?:think|thinking|thought|reasoning)>", text, flags=re.IGNORECASE)
        return parts[-1]
    end = re.compile(rf"</{begun[-1]}>", re.IGNORECASE)
    ends = list(end.finditer(text))
    return text[ends[-1].end() :] if ends and ends[-1].start() > text.lower().rfind(f"<{begun[-1]}>") else None


# ---- objects ------------------------------------------------------------------------------------------------------


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the outermost JSON objects of a text."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
        at = text.find("{", end)


def _from_object(text: str, scale: _Scale) -> tuple[bool, float | None]:
    """Return whether the text has an object with a score, and the score of the last one."""
    found, value = False, None
    for item in _objects(text):
        scores = _scores_in(item)
        nested = [value for value in item.values() if isinstance(value, dict) and _scores_in(value)]
        if not scores and len(nested) > 1:
            return True, None
        if not scores and nested and "example" not in item:
            item = nested[0]
            scores = _scores_in(item)
        if scores:
            found, value = True, _number_in(scores[0], item, scale)
    return found, value


def _scores_in(item: dict[str, Any]) -> list[Any]:
    keyed = {re.sub(r"\W+", "_", key.strip().lower()): value for key, value in item.items()}
    return [keyed[key] for keys in KEYS for key in keys if key in keyed and not isinstance(keyed[key], dict | list)]


def _number_in(value: Any, item: dict[str, Any], scale: _Scale) -> float | None:
    keyed = {re.sub(r"\W+", "_", key.strip().lower()): value for key, value in item.items()}
    limits = [keyed[key] for key in LIMITS if isinstance(keyed.get(key), int | float)]
    if any(limit != scale.high for limit in limits):
        return None
    if isinstance(value, str):
        alone = ALONE.match(_plain(value))
        return _value_of(alone, scale) if alone else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return scale.checked(float(value))


# ---- text ---------------------------------------------------------------------------------------------------------


def _matches(pattern: re.Pattern[str], plain: str) -> Iterator[re.Match[str]]:
    """Yield the matches that are no examples; one may begin in the rest of another."""
    at = 0
    while match := pattern.search(plain, at):
        word, begin = _word(match), match.start("sign") if "sign" in match.re.groupindex else match.start("number")
        apart = "\n" in plain[begin : match.start("number")]
        heading = apart and (word in WEAK | BARE_FINAL or LISTED.match(match["rest"]))
        # `Total: 3 issues` is a remark, `Total: 3/5` a score.
        remark = word in BARE_FINAL and not ENDS.match(match["rest"])
        if not SUPPOSED.match(match["rest"]) and not heading and not remark:
            yield match
        at = match.end("number")


def _word(match: re.Match[str]) -> str:
    return (match.groupdict().get("word") or "").lower()


def _kind(match: re.Match[str]) -> set[str] | None:
    """Return `FINAL`, `PLAIN` or `WEAK` by the words for a score; None for the score of something else."""
    words = (match["qualifier"] or "").lower().replace("'", "").split()
    last, word = words[-1] if words else "", _word(match)
    if len(words) > 1 and match["qualifier"].split()[-1] in ("A", "B") and words[-2] in NAMED:
        return None
    if any(other in words for other in ("users", "user", "human", "previous", "maximum", "max", "example")):
        return None
    if last in FINAL or word in BARE_FINAL:
        return FINAL
    if word in WEAK:
        return WEAK
    return PLAIN if last in PLAIN or word not in ("score", "scores", "rating", "ratings") else None


def _value_of(match: re.Match[str], scale: _Scale) -> float | None:
    """Return the number of a match, unless its scale is another one or it is no single number."""
    rest = match["rest"]
    before = match.groupdict().get("before") or ""
    written = SCALE.match(rest)
    scales = [written["scale"]] if written else []
    scales += re.findall(r"(?:out of|/|max\w*\s*:?|-|\bto)\s*(\d+)", before)
    sign = match.end("sign") if "sign" in match.re.groupindex else match.start("number")
    begins = match.string[sign : match.start("number")][-1:]
    bounded = begins in ("~", ">") or (begins == "<" and not rest.lstrip().startswith(">"))
    if any(float(number) != scale.high for number in scales) or UNSURE.match(rest) or bounded:
        return None
    return scale.checked(_value(match["number"].lower()))


def _plain(text: str) -> str:
    """Remove markup and quotes; normalize dashes and digits, `4½` to `4.5`, and a power's `4²` to `4^2`."""
    text = re.sub(r"(?<=\d)\s?([\u00bc-\u00be\u2150-\u215e])", lambda m: f"{unicodedata.numeric(m[1]):g}"[1:], text)
    text = re.sub(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u2070-\u2079])", "^", text)
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/").translate(DASHES).translate(MARKUP)


def _value(number: str) -> float | None:
    if number in WORDS:
        return WORDS[number]
    first, _, last = number.partition("=")
    # `1 + 1 + 1 = 3` or `3 = 1 + 1 + 1`; a sum that is not its result is unsure.
    sides = [sum(_decimal(part) for part in side.split("+")) for side in (first, last) if side]
    return sides[0] if len(set(sides)) == 1 else None


def _decimal(text: str) -> float:
    """Return a number; a comma before three digits groups thousands, another one is a decimal comma."""
    text = text.strip()
    return float(text.replace(",", "") if re.fullmatch(r"-?\d{1,3},\d{3}", text) else text.replace(",", "."))
