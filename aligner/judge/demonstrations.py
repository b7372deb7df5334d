"""Demonstrations of judging: `nemo llm judge-demonstrations`.

A policy that is to judge itself learns both tasks first: answering, and judging by the very prompt that it will be
asked with (Yuan et al. 2024, arXiv 2401.10020, section 2: instructions and evaluations as seed data).
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from aligner.common.errors import ConfigError, RowError
from aligner.common.files import atomic_write
from aligner.data import rows, sources
from aligner.data.forms.messages import text_of
from aligner.judge import templates
from aligner.judge.judges import AS_JSON, PLACEHOLDERS
from aligner.judge.scores import parse_score

KEYS = ("prompt", "response", "judgment", "score", "reasoning")


def judge_demonstrations(
    data: Union[str, list[str]],
    output: str,
    template: str = "additive",
    response_format: Literal["text", "json"] = "text",
    min_score: float = 0,
    max_score: float = 5,
) -> Path:
    """Write rated responses as demonstrations of judging, for `nemo llm align --factory MODEL_sft`.

    A row has `prompt`, `response`, and either `judgment`, the text of a judge that states its score, or `score`, a
    number, with `reasoning` if there is some. It becomes a row of `prompt`, the judge's prompt, and `response`, the
    judgment. The arguments are those of the judge that the policy is to be.

    Args:
        data: file, folder, glob or list of rated responses.
        output: file of demonstrations to write; must not exist.
        template: `additive`, `direct`, or a Jinja file with {{ prompt }} and {{ response }}.
        response_format: text, or json where the judgments will be JSON objects.
        min_score: lowest score.
        max_score: highest score.

    Raises:
        RowError: a row is invalid, or its judgment has no score that can be read.
        ConfigError: an argument is invalid, or the output exists.
    """
    target = Path(output).expanduser()
    if target.exists():
        raise ConfigError(f"output: {target} exists already; remove it or name another file")
    if response_format not in ("text", "json"):
        raise ConfigError(f"response_format: {response_format!r} is neither text nor json")
    if not min_score < max_score:
        raise ConfigError(f"min_score, max_score: {min_score} to {max_score} is no scale")
    render = templates.template(template, "template", needed=PLACEHOLDERS, known={"min_score", "max_score"})
    as_json, scale = response_format == "json", (min_score, max_score)
    counts: Counter[float] = Counter()
    with atomic_write(target) as partial, partial.open("w", encoding="utf-8") as file:
        for row, source in _rows(data):
            prompt, response = templates.as_text(text_of(row, "prompt", source)), row["response"]
            judgment, score = _judgment(row, source, scale, as_json=as_json)
            asked = render(prompt=prompt, response=response, min_score=min_score, max_score=max_score)
            line = {"prompt": asked + (AS_JSON if as_json else ""), "response": judgment}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            counts[score] += 1
        if not counts:
            raise RowError(f"{data}: holds no rows")
    shown = ", ".join(f"{score:g} ({count} times)" for score, count in sorted(counts.items()))
    print(f"written: {counts.total()} demonstrations to {output}; scores {shown}")
    return target


def _rows(data: Any) -> Iterator[tuple[dict[str, Any], str]]:
    for part in sources.resolve_files(data, "data"):
        if part.weight is not None:
            raise ConfigError("data: has weights, which choose rows in every epoch; leave them out")
        for chunk in sources.chunks(part.path):
            for text, source in chunk.texts():
                row = rows.load_json(text, source)
                unknown = sorted(set(row) - {*KEYS, "id", "metadata"})
                if unknown:
                    raise RowError(f"{source}: has {unknown[0]!r}, which is not read; a row has {', '.join(KEYS)}")
                if not isinstance(row.get("response"), str) or not row["response"].strip():
                    raise RowError(f"{source}: 'response' must be text, found {row.get('response')!r}")
                yield row, source


def _judgment(row: dict[str, Any], source: str, scale: tuple[float, float], *, as_json: bool) -> tuple[str, float]:
    """Return the text of a row's judgment, and its score."""
    score = _score(row, source, scale)
    given, reasoning = (_text(row, name, source) for name in ("judgment", "reasoning"))
    if given and reasoning:
        raise RowError(f"{source}: has 'judgment' and 'reasoning'; a judgment is text that holds its reasoning")
    if not given and score is None:
        raise RowError(f"{source}: has neither 'judgment', a text that states its score, nor 'score', a number")
    if given and as_json and not given.lstrip().startswith("{"):
        raise RowError(f"{source}: 'judgment' is no JSON object, as response_format=json has it; give score, reasoning")
    if given:
        text, name = given, "judgment"
    elif as_json:
        text, name = json.dumps({"reasoning": reasoning, "score": score}, ensure_ascii=False), "reasoning"
    else:
        text, name = f"{reasoning.strip()}\n\nScore: {score:g}".lstrip(), "reasoning"
    read = parse_score(text, min_score=scale[0], max_score=scale[1])
    if read is None:
        raise RowError(f"{source}: {name!r} states no score that can be read; it must end with one, as Score: 4")
    if score is not None and read != score:
        raise RowError(f"{source}: {name!r} states {read:g}, and score is {score:g}")
    return text, read


def _text(row: dict[str, Any], name: str, source: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{source}: {name!r} must be text, found {value!r}")
    return value or ""


def _score(row: dict[str, Any], source: str, scale: tuple[float, float]) -> float | None:
    score = row.get("score")
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise RowError(f"{source}: 'score' must be a number, found {score!r}")
    if not scale[0] <= score <= scale[1]:
        raise RowError(f"{source}: 'score' must be from {scale[0]:g} to {scale[1]:g}, found {score!r}")
    return score
