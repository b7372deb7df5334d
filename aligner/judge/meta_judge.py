"""Meta-judging: preference pairs that train the judge (meta-rewarding, Wu et al. 2024, arXiv 2407.19594, section 2.3).

For each prompt, the response with the highest variance of scores is selected. Every two of its judgments are compared,
in both orders. Ratings from these comparisons are corrected for position bias. The best and the worst judgment become
a pair of the judging task.
"""

import itertools
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from aligner.common import hashing
from aligner.common.console import log_rank0
from aligner.common.errors import ConfigError
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
from aligner.judge.scores import without_scores
from aligner.judge.verdicts import parse_winner

PLACEHOLDERS = {"prompt", "response", "judgment_a", "judgment_b"}


@dataclass(frozen=True)
class Disputed:
    """A response with its judgments and their scores."""

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
    max_chosen_tokens: Optional[int] = None,
    show_scores: bool = False,
    seed: int = 9876,
) -> Path:
    """Compare judgments and write pairs of the judging task. If `output` is incomplete, comparing resumes.

    Args:
        prompts: prompts of the candidates.
        candidates: output of `generate-responses`.
        judgments: output of `judge-responses`.
        output: file of pairs to write; `output.battles.jsonl` contains the comparisons and their winners.
        engine: generation backend of the meta-judge.
        judge: judge of the responses; its template is the prompt of the pairs.
        template: `meta`, or a Jinja file with {{ prompt }}, {{ response }}, {{ judgment_a }} and {{ judgment_b }}.
        temperature: sampling temperature of comparisons.
        top_p: nucleus sampling threshold.
        max_tokens: maximum number of tokens of a comparison.
        stop: strings that end a comparison; the comparison does not include them.
        max_same_score_fraction: maximum fraction of pairs whose better judgment gives the same score (rounded); 1 is
            no limit.
        max_chosen_tokens: maximum number of tokens of the better judgment of a pair; None: no limit.
        show_scores: whether the meta-judge sees the scores that the judgments state. By default it compares the
            reasoning alone, as NeMo-Aligner has it; models tend to prefer the judgment with the higher score.
        seed: random seed.

    Returns:
        The output.

    Raises:
        RowError: an input file is missing, or a line is invalid.
        ConfigError: an argument is invalid, or the output was begun with other settings.
    """
    path = Path(output).expanduser()
    render = templates.template(template, "meta_judge.template", needed=PLACEHOLDERS, known=set())
    if max_chosen_tokens is not None and max_chosen_tokens < 1:
        raise ConfigError(f"meta_judge.max_chosen_tokens: must be at least 1, found {max_chosen_tokens}")
    disputed = _disputed(prompts, candidates, judgments)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop or ()))
    requests = _requests(disputed, render, str if show_scores else without_scores, seed)

    def row(request: GenerationRequest, result: GenerationResult) -> JsonObject:
        return {
            "key": request.key,
            "winner": parse_winner(result.text),
            "verdict": result.text,
            "num_tokens": result.num_tokens,
            "finish_reason": result.finish_reason,
            "seed": request.seed,
        }

    settings = {
        "meta_judge.template": templates.settings_of(template),
        "meta_judge.seed": seed,
        "meta_judge.show_scores": show_scores,
        **{f"meta_judge.{name}": value for name, value in vars(sampling).items()},
        "engine": engine.describe(),
        "of": {"judgments": hashing.short_hash(repr([(d.key, d.judgments) for d in disputed]).encode())},
    }
    battles = path.with_name(f"{path.name}.battles.jsonl")
    generate_to_file(
        Journal(battles, settings), engine, requests, sampling, row, refuse_long=False, cache=path.parent / "models"
    )
    from aligner.backend.distributed import rank_zero_first

    with rank_zero_first() as first:
        if first:
            limits = _Limits(max_same_score_fraction, max_chosen_tokens)
            _write_pairs(path, battles, disputed, judge, limits)
    return path


def _requests(
    disputed: list[Disputed], render: Callable[..., str], shown: Callable[[str], str], seed: int
) -> list[GenerationRequest]:
    """Return the comparisons of every two judgments in both orders; `shown` is what is seen of a judgment."""
    requests = []
    for dispute in disputed:
        for i, j in itertools.permutations(range(len(dispute.judgments)), 2):
            text = render(
                prompt=templates.as_text(dispute.prompt),
                response=dispute.response,
                judgment_a=shown(dispute.judgments[i]["judgment"]),
                judgment_b=shown(dispute.judgments[j]["judgment"]),
            )
            key = f"{dispute.key}/{i}-{j}"
            requests.append(
                GenerationRequest(key=key, prompt=text, seed=seed_of(seed, key), source=f"comparison {key}")
            )
    return requests


class _Limits(NamedTuple):
    same_score_fraction: float
    chosen_tokens: int | None


def _write_pairs(path: Path, battles: Path, disputed: list[Disputed], judge: ModelJudge, limits: _Limits) -> None:
    settings = {
        "meta_judge.max_same_score_fraction": limits.same_score_fraction,
        "meta_judge.max_chosen_tokens": limits.chosen_tokens,
        "judge.template": templates.settings_of(judge.template),
    }
    pairs = Journal(path, {"of": {"battles": hashing.files_hash(battles)}, **settings})
    if not pairs.check_finished():
        pairs.write_all(_pairs(disputed, list(journal.read(battles)), judge, limits, _report_file(path)))


def report_of(path: Path) -> dict[str, float]:
    """Return the metrics of a file of pairs: comparisons, unparsed comparisons, win rate of the first position.

    The win rate is 0.5 without position bias. The result is empty for a file that `meta_judge` did not write.
    """
    file = _report_file(path)
    return json.loads(file.read_text()) if file.is_file() else {}


def _report_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.comparisons.json")


def _disputed(source: Any, candidates: str, judgments: str) -> list[Disputed]:
    """Return for each prompt the response with the highest variance of scores, if any variance is above 0."""
    scored: dict[str, list[JsonObject]] = {}
    for row in journal.read(Path(judgments).expanduser()):
        if row["score"] is not None:
            scored.setdefault(parent_key(row["key"]), []).append(row)
    prompt_index = PromptIndex(source, candidates)
    found: dict[str, tuple[float, Disputed]] = {}
    for row in journal.read(Path(candidates).expanduser()):
        prompt = prompt_index.prompt(row["key"])
        # Identical judgments count once.
        distinct = list({j["judgment"].strip(): j for j in scored.get(row["key"], [])}.values())
        variance = statistics.pvariance([j["score"] for j in distinct]) if len(distinct) > 1 else 0.0
        if variance > found.get(prompt.id, (0.0, None))[0]:
            found[prompt.id] = (variance, Disputed(row["key"], prompt.prompt, row["response"], distinct))
    return [disputed for _, disputed in found.values()]


def _pairs(
    disputed: list[Disputed], battles: list[JsonObject], judge: ModelJudge, limits: _Limits, report: Path
) -> list[JsonObject]:
    """Pair the best and the worst judgment of each response, as rows of the judging task."""
    comparisons: dict[str, list[Comparison]] = {}
    for row in battles:
        key, _, pair = row["key"].rpartition("/")
        i, j = map(int, pair.split("-"))
        comparisons.setdefault(key, []).append(Comparison(i, j, row["winner"]))
    positions = bias(itertools.chain.from_iterable(comparisons.values()))
    rows, dropped = [], Counter[str]()
    for dispute in disputed:
        pair_or_reason = _pair(dispute, comparisons.get(dispute.key, []), positions, judge, limits.chosen_tokens)
        if isinstance(pair_or_reason, str):
            dropped[pair_or_reason] += 1
        else:
            rows.append(pair_or_reason)
    balanced = _balanced(rows, limits.same_score_fraction)
    dropped["too many with one score"] = len(rows) - len(balanced)
    dropped_text = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items() if count)
    num_unparsed = sum(row["winner"] is None for row in battles)
    log_rank0(
        f"judge pairs: {len(balanced)} of {len(disputed)} disputed responses{dropped_text}; {num_unparsed} of "
        f"{len(battles)} comparisons could not be parsed; the first place won {positions.share:.0%} of "
        f"{positions.first + positions.second}"
    )
    metrics = {
        "comparisons": len(battles),
        "unparsed_comparisons": num_unparsed,
        "first_position_win_rate": positions.share,
    }
    with atomic_write(report) as partial:
        partial.write_text(json.dumps(metrics))
    return balanced


def _pair(
    dispute: Disputed, comparisons: list[Comparison], positions: Bias, judge: ModelJudge, max_chosen_tokens: int | None
) -> JsonObject | str:
    """Return a row, or the reason why there is none."""
    rating = ratings(len(dispute.judgments), comparisons, positions)
    if rating is None:
        return "no winner"
    order = sorted(range(len(rating)), key=lambda i: rating[i])
    best, worst = dispute.judgments[order[-1]], dispute.judgments[order[0]]
    if best["score"] == worst["score"]:
        return "equal scores"
    if best["finish_reason"] != "stop":
        return "the better one did not end"
    if worst["finish_reason"] != "stop":
        return "the worse one did not end"
    if max_chosen_tokens is not None and best["num_tokens"] > max_chosen_tokens:
        return "the better one is too long"
    return {
        "prompt": judge.render_prompt(dispute.prompt, dispute.response),
        "chosen_response": best["judgment"],
        "rejected_response": worst["judgment"],
        # The judge's points, as for pairs of responses: ratings are log-odds, with gaps several times as large. The
        # better judgment may be the one with the lower score, and its reward is the higher one all the same.
        "chosen_reward": max(best["score"], worst["score"]),
        "rejected_reward": min(best["score"], worst["score"]),
        "metadata": {
            "scores": {"chosen": best["score"], "rejected": worst["score"]},
            "ratings": {"chosen": rating[order[-1]], "rejected": rating[order[0]]},
        },
        "key": dispute.key,
    }


def _balanced(rows: list[JsonObject], most: float) -> list[JsonObject]:
    """Drop rows at random until at most a fraction `most` has the same better score; else the judge learns that score.

    The largest possible number of rows is kept. With too few distinct scores for the fraction, each score keeps an
    equal number.
    """
    classes = Counter(map(stated_score, rows))
    most = max(most, 1 / len(classes)) if len(classes) > 1 else most
    num_kept = len(rows)
    while num_kept and sum(min(count, int(most * num_kept + 1e-9)) for count in classes.values()) < num_kept:
        num_kept -= 1
    limit, taken, balanced = int(most * num_kept + 1e-9), Counter[int | None](), []
    for row in random.Random(0).sample(rows, len(rows)):
        if taken[stated_score(row)] < limit:
            taken[stated_score(row)] += 1
            balanced.append(row)
    return balanced


def stated_score(pair: JsonObject) -> int | None:
    """Return the score, rounded, that the better judgment of a pair states; None if the pair does not say."""
    scores = (pair.get("metadata") or {}).get("scores") or {}
    return round(scores["chosen"]) if "chosen" in scores else None
