"""Judging judgements, so that judging is learned, too: meta-rewarding (Wu et al. 2024, arXiv 2407.19594, section 2.3).

Of each prompt the answer that its judgements disagree on most is taken. Every two of its judgements are compared, both
ways round; from who won where follow ratings that places do not count in; the best and the worst judgement become a
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

from aligner import journal, naming, templates
from aligner.asking import ask
from aligner.console import say
from aligner.engines import Answer, Engine, Question
from aligner.files import written_whole
from aligner.journal import Journal, Row
from aligner.judge import ModelJudge
from aligner.prompts import Answered, above
from aligner.ratings import Bias, Comparison, bias, ratings
from aligner.sampling import Sampling, seed_of
from aligner.verdicts import parse_winner

NEEDED = {"prompt", "response", "judgement_a", "judgement_b"}


@dataclass(frozen=True)
class Disputed:
    """An answer, and its judgements with scores."""

    key: str
    prompt: Any
    response: str
    judgements: list[Row]


def meta_judge(
    prompts: Union[str, list[str]],
    candidates: str,
    judgements: str,
    output: str,
    engine: Engine,
    judge: ModelJudge,
    template: str = "meta",
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_tokens: int = 512,
    stop: Optional[list[str]] = None,
    most_of_a_score: float = 0.4,
    seed: int = 9876,
) -> Path:
    """Make pairs of the judging task from a file of judgements; run again, it goes on where it was.

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        judgements: what `judge-responses` wrote.
        output: the file of pairs to write; `output.battles.jsonl` holds what was compared, and who won.
        engine: who compares.
        judge: who judged; its template is the prompt of the pairs.
        template: `meta`, or a jinja file with {{ prompt }}, {{ response }}, {{ judgement_a }} and {{ judgement_b }}.
        temperature: of comparisons; logits are divided by it.
        top_p: of the likeliest tokens, the fewest that have this much probability together.
        max_tokens: of a comparison.
        stop: texts that one ends before.
        most_of_a_score: of all pairs, at most so many whose better judgement gives the same score (rounded).
        seed: another one gives other comparisons.

    Returns:
        The output.

    Raises:
        RowError: a file does not hold what it should.
        ConfigError: an argument is not as it must be, or the output was begun with others.
    """
    path = Path(output).expanduser()
    render = templates.template(template, "meta.template", needed=NEEDED, known=set())
    disputed = _disputed(prompts, candidates, judgements)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop or ()))
    questions = []
    for each in disputed:
        for i, j in itertools.permutations(range(len(each.judgements)), 2):
            text = render(
                prompt=templates.as_text(each.prompt),
                response=each.response,
                judgement_a=each.judgements[i]["judgement"],
                judgement_b=each.judgements[j]["judgement"],
            )
            key = f"{each.key}/{i}-{j}"
            questions.append(Question(key=key, prompt=text, seed=seed_of(seed, key), source=f"comparison {key}"))

    def row(question: Question, answer: Answer) -> Row:
        told = {"verdict": answer.text, "tokens": answer.tokens, "finish": answer.finish, "seed": question.seed}
        return {"key": question.key, "winner": parse_winner(answer.text), **told}

    settings = {
        "meta.template": templates.settings_of(template),
        "meta.seed": seed,
        **{f"meta.{name}": value for name, value in vars(sampling).items()},
        "engine": engine.identity(),
        "of": {"judgements": naming.short_hash(repr([(each.key, each.judgements) for each in disputed]).encode())},
    }
    battles = path.with_name(f"{path.name}.battles.jsonl")
    ask(Journal(battles, settings), engine, questions, sampling, row, refuse_long=False, cache=path.parent / "models")
    from aligner.process import together

    with together() as first:
        if first:
            asked = {"meta.most_of_a_score": most_of_a_score, "judge.template": templates.settings_of(judge.template)}
            made = Journal(path, {"of": {"battles": naming.files_hash(battles)}, **asked})
            if not made.finished:
                made.put(_pairs(disputed, list(journal.read(battles)), judge, most_of_a_score, _report_file(path)))
    return path


def report_of(path: Path) -> dict[str, float]:
    """What was told of a file of pairs: comparisons, those that could not be read, and the share that the answer in
    the first place won, which is 0.5 without position bias. Empty for a file that somebody else made."""
    held = _report_file(path)
    return json.loads(held.read_text()) if held.is_file() else {}


def _report_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.comparisons.json")


def _disputed(source: Any, candidates: str, judgements: str) -> list[Disputed]:
    """Of each prompt the answer with the highest variance of scores, if there is one."""
    scored: dict[str, list[Row]] = {}
    for row in journal.read(Path(judgements).expanduser()):
        if row["score"] is not None:
            scored.setdefault(above(row["key"]), []).append(row)
    asked = Answered(source, candidates)
    found: dict[str, tuple[float, Disputed]] = {}
    for row in journal.read(Path(candidates).expanduser()):
        prompt, held = asked.prompt(row["key"]), scored.get(row["key"], [])
        # The same words twice are one judgement.
        distinct = list({each["judgement"].strip(): each for each in held}.values())
        variance = statistics.pvariance([each["score"] for each in distinct]) if len(distinct) > 1 else 0.0
        if variance > found.get(prompt.id, (0.0, None))[0]:
            found[prompt.id] = (variance, Disputed(row["key"], prompt.prompt, row["response"], distinct))
    return [disputed for _, disputed in found.values()]


def _pairs(
    disputed: list[Disputed], battles: list[Row], judge: ModelJudge, most_of_a_score: float, report: Path
) -> list[Row]:
    """Best against worst judgement of each answer, as rows of the judging task."""
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
    balanced = _balanced(rows, most_of_a_score)
    dropped["too many with one score"] = len(rows) - len(balanced)
    told = "".join(f", {count} dropped: {why}" for why, count in dropped.items() if count)
    unread = sum(row["winner"] is None for row in battles)
    say(
        f"judge pairs: {len(balanced)} of {len(disputed)} disputed answers{told}; {unread} of {len(battles)} "
        f"comparisons could not be read; the first place won {places.share:.0%} of {places.first + places.second}"
    )
    numbers = {"comparisons": len(battles), "unread_comparisons": unread, "first_place_share": places.share}
    with written_whole(report) as partial:
        partial.write_text(json.dumps(numbers))
    return balanced


def _pair(each: Disputed, fought: list[Comparison], places: Bias, judge: ModelJudge) -> Row | str:
    """A row, or why there is none."""
    found = ratings(len(each.judgements), fought, places)
    if found is None:
        return "no winner"
    order = sorted(range(len(found)), key=lambda i: found[i])
    best, worst = each.judgements[order[-1]], each.judgements[order[0]]
    if best["score"] == worst["score"]:
        return "equal scores"
    if best["finish"] != "stop":
        return "the better one did not end"
    return {
        "prompt": judge.asked(each.prompt, each.response),
        "chosen_response": best["judgement"],
        "rejected_response": worst["judgement"],
        "chosen_reward": found[order[-1]],
        "rejected_reward": found[order[0]],
        "chosen_score": best["score"],
        "rejected_score": worst["score"],
        "key": each.key,
    }


def _balanced(rows: list[Row], most: float) -> list[Row]:
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
