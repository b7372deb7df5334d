"""Judging judgments, so that judging is learned, too: meta-rewarding (Wu et al. 2024, arXiv 2407.19594, section 2.3).

Of each prompt the answer that its judgments disagree on most is taken. Every two of its judgments are compared, both
ways round; from who won where follow ratings that places do not count in; the best and the worst judgment become a
pair of the judging task.
"""

import itertools
import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from aligner.common import hashing
from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.data.prompts import PromptIndex, parent_key
from aligner.generate import journal
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.journal import Journal, JsonObject
from aligner.generate.requests import generate_to_file
from aligner.generate.sampling import Sampling, seed_of
from aligner.judge import templates
from aligner.judge.judges import ModelJudge
from aligner.judge.ratings import Bias, Comparison, bias, ratings
from aligner.judge.verdicts import parse_winner

NEEDED = {"prompt", "response", "judgment_a", "judgment_b"}


@dataclass(frozen=True)
class Disputed:
    """An answer, and its judgments with scores."""

    key: str
    prompt: Any
    response: str
    judgments: list[JsonObject]


def meta_judge(
    prompts: Union[str, list[str]],
    candidates: str,
    judgments: str,
    output: str,
    engine: Engine,
    judge: ModelJudge,
    template: str = "meta",
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_tokens: int = 512,
    stop: Optional[list[str]] = None,
    max_same_score_fraction: float = 0.4,
    seed: int = 9876,
) -> Path:
    """Make pairs of the judging task from a file of judgments; run again, it goes on where it was.

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        judgments: what `judge-responses` wrote.
        output: the file of pairs to write; `output.battles.jsonl` holds what was compared, and who won.
        engine: who compares.
        judge: who judged; its template is the prompt of the pairs.
        template: `meta`, or a jinja file with {{ prompt }}, {{ response }}, {{ judgment_a }} and {{ judgment_b }}.
        temperature: of comparisons; logits are divided by it.
        top_p: of the likeliest tokens, the fewest that have this much probability together.
        max_tokens: of a comparison.
        stop: texts that one ends before.
        max_same_score_fraction: of all pairs, at most so many whose better judgment gives the same score (rounded).
        seed: another one gives other comparisons.

    Returns:
        The output.

    Raises:
        RowError: a file does not hold what it should.
        ConfigError: an argument is not as it must be, or the output was begun with others.
    """
    path = Path(output).expanduser()
    render = templates.template(template, "meta_judge.template", needed=NEEDED, known=set())
    disputed = _disputed(prompts, candidates, judgments)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop or ()))
    questions = []
    for each in disputed:
        for i, j in itertools.permutations(range(len(each.judgments)), 2):
            text = render(
                prompt=templates.as_text(each.prompt),
                response=each.response,
                judgment_a=each.judgments[i]["judgment"],
                judgment_b=each.judgments[j]["judgment"],
            )
            key = f"{each.key}/{i}-{j}"
            questions.append(
                GenerationRequest(key=key, prompt=text, seed=seed_of(seed, key), source=f"comparison {key}")
            )

    def row(question: GenerationRequest, answer: GenerationResult) -> JsonObject:
        told = {
            "verdict": answer.text,
            "num_tokens": answer.num_tokens,
            "finish_reason": answer.finish_reason,
            "seed": question.seed,
        }
        return {"key": question.key, "winner": parse_winner(answer.text), **told}

    settings = {
        "meta_judge.template": templates.settings_of(template),
        "meta_judge.seed": seed,
        **{f"meta_judge.{name}": value for name, value in vars(sampling).items()},
        "engine": engine.describe(),
        "of": {"judgments": hashing.short_hash(repr([(each.key, each.judgments) for each in disputed]).encode())},
    }
    battles = path.with_name(f"{path.name}.battles.jsonl")
    generate_to_file(
        Journal(battles, settings), engine, questions, sampling, row, refuse_long=False, cache=path.parent / "models"
    )
    from aligner.backend.distributed import rank_zero_first

    with rank_zero_first() as first:
        if first:
            _write_pairs(path, battles, disputed, judge, max_same_score_fraction)
    return path


def _write_pairs(
    path: Path, battles: Path, disputed: list[Disputed], judge: ModelJudge, max_same_score_fraction: float
) -> None:
    settings = {
        "meta_judge.max_same_score_fraction": max_same_score_fraction,
        "judge.template": templates.settings_of(judge.template),
    }
    pairs = Journal(path, {"of": {"battles": hashing.files_hash(battles)}, **settings})
    if not pairs.check_finished():
        rows = _pairs(disputed, list(journal.read(battles)), judge, max_same_score_fraction, _report_file(path))
        pairs.write_all(rows)


def report_of(path: Path) -> dict[str, float]:
    """What was told of a file of pairs: comparisons, those that could not be read, and the share that the answer in
    the first place won, which is 0.5 without position bias. Empty for a file that somebody else made."""
    held = _report_file(path)
    return json.loads(held.read_text()) if held.is_file() else {}


def _report_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.comparisons.json")


def _disputed(source: Any, candidates: str, judgments: str) -> list[Disputed]:
    """Of each prompt the answer with the highest variance of scores, if there is one."""
    scored: dict[str, list[JsonObject]] = {}
    for row in journal.read(Path(judgments).expanduser()):
        if row["score"] is not None:
            scored.setdefault(parent_key(row["key"]), []).append(row)
    asked = PromptIndex(source, candidates)
    found: dict[str, tuple[float, Disputed]] = {}
    for row in journal.read(Path(candidates).expanduser()):
        prompt, held = asked.prompt(row["key"]), scored.get(row["key"], [])
        # The same words twice are one judgment.
        distinct = list({each["judgment"].strip(): each for each in held}.values())
        variance = statistics.pvariance([each["score"] for each in distinct]) if len(distinct) > 1 else 0.0
        if variance > found.get(prompt.id, (0.0, None))[0]:
            found[prompt.id] = (variance, Disputed(row["key"], prompt.prompt, row["response"], distinct))
    return [disputed for _, disputed in found.values()]


def _pairs(
    disputed: list[Disputed], battles: list[JsonObject], judge: ModelJudge, max_same_score_fraction: float, report: Path
) -> list[JsonObject]:
    """Best against worst judgment of each answer, as rows of the judging task."""
    fought: dict[str, list[Comparison]] = {}
    for row in battles:
        key, _, pair = row["key"].rpartition("/")
        i, j = map(int, pair.split("-"))
        fought.setdefault(key, []).append(Comparison(i, j, row["winner"]))
    places = bias(itertools.chain.from_iterable(fought.values()))
    rows, dropped = [], Counter[str]()
    for each in disputed:
        made = _pair(each, fought.get(each.key, []), places, judge)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            rows.append(made)
    balanced = _balanced(rows, max_same_score_fraction)
    dropped["too many with one score"] = len(rows) - len(balanced)
    told = "".join(f", {count} dropped: {why}" for why, count in dropped.items() if count)
    unread = sum(row["winner"] is None for row in battles)
    log_rank0(
        f"judge pairs: {len(balanced)} of {len(disputed)} disputed answers{told}; {unread} of {len(battles)} "
        f"comparisons could not be read; the first place won {places.share:.0%} of {places.first + places.second}"
    )
    numbers = {"comparisons": len(battles), "unparsed_comparisons": unread, "first_position_win_rate": places.share}
    with atomic_write(report) as partial:
        partial.write_text(json.dumps(numbers))
    return balanced


def _pair(each: Disputed, fought: list[Comparison], places: Bias, judge: ModelJudge) -> JsonObject | str:
    """A row, or why there is none."""
    found = ratings(len(each.judgments), fought, places)
    if found is None:
        return "no winner"
    order = sorted(range(len(found)), key=lambda i: found[i])
    best, worst = each.judgments[order[-1]], each.judgments[order[0]]
    if best["score"] == worst["score"]:
        return "equal scores"
    if best["finish_reason"] != "stop":
        return "the better one did not end"
    return {
        "prompt": judge.asked(each.prompt, each.response),
        "chosen_response": best["judgment"],
        "rejected_response": worst["judgment"],
        "chosen_reward": found[order[-1]],
        "rejected_reward": found[order[0]],
        "chosen_score": best["score"],
        "rejected_score": worst["score"],
        "key": each.key,
    }


def _balanced(rows: list[JsonObject], most: float) -> list[JsonObject]:
    """At most a share `most` of the rows with the same better score: else the judge learns to give always that one.

    The largest number of rows is kept for which the share holds; of scores too few to keep to it, as many of each.
    """
    classes = Counter(round(row["chosen_score"]) for row in rows)
    most = max(most, 1 / len(classes)) if len(classes) > 1 else most
    kept = len(rows)
    while kept and sum(min(count, int(most * kept + 1e-9)) for count in classes.values()) < kept:
        kept -= 1
    limit, taken, found = int(most * kept + 1e-9), Counter[int](), []
    for row in random.Random(0).sample(rows, len(rows)):
        if taken[round(row["chosen_score"])] < limit:
            taken[round(row["chosen_score"])] += 1
            found.append(row)
    return found
