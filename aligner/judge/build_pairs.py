"""From judged answers to rows that are trained on: pairs of self-rewarding, of `spin`, the best of several.

Each is a stage: files in, a file of rows out, and beside it a report of what became of the prompts
(`aligner.judge.iteration_report`).
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

from aligner.common import hashing
from aligner.common.console import log_rank0
from aligner.common.errors import ConfigError, RowError, SanityCheckError
from aligner.data.prompts import Prompt, PromptIndex, parent_key, read_prompts
from aligner.generate import journal
from aligner.generate.journal import JsonObject
from aligner.generate.requests import speed_of
from aligner.judge.iteration_report import IterationReport
from aligner.judge.meta_judge import report_of
from aligner.judge.selection import Candidate, best, check_control, select

ANSWER = ("key", "response", "num_tokens", "finish_reason")
"""What a line of answers must hold."""


def select_pairs(
    prompts: Union[str, list[str]],
    candidates: str,
    judgments: str,
    output: str,
    length_control: float = 0.0,
    judge_pairs: Optional[str] = None,
    max_judge_pair_fraction: float = 0.15,
    min_pair_fraction: float = 0.05,
    max_score: float = 5.0,
) -> Path:
    """Make a pair of each prompt's best and worst answer (`aligner.judge.selection`).

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        judgments: what `judge-responses` wrote.
        output: the file of pairs to write, with `chosen_reward` and `rejected_reward`; `output.report.json` and
            `output.report.html` say how it went.
        length_control: ρ, from 0 to below 0.5.
        judge_pairs: pairs of the judging task that `meta-judge` wrote, to be trained on, too.
        max_judge_pair_fraction: of all rows, at most; more are left out at random.
        min_pair_fraction: of prompts that give a pair; if fewer do, the run stops.
        max_score: the judge's highest score, to tell when it gives nothing else.

    Returns:
        The output.

    Raises:
        RowError: a file does not hold what it should.
        GateError: too few pairs are left to learn from.
    """
    check_control(length_control)
    if not 0 <= max_judge_pair_fraction < 1:
        raise ConfigError(f"max_judge_pair_fraction: must be from 0 to below 1, found {max_judge_pair_fraction}")

    def rows(report: IterationReport) -> Iterator[JsonObject]:
        kept = 0
        for prompt, answers in _answered(prompts, candidates, judgments, report):
            found = select(answers, length_control=length_control)
            report.add(prompt, answers, found)
            if found.chosen and found.rejected:
                kept += 1
                yield _pair(prompt, found.chosen, found.rejected)
        yield from _capped(judge_pairs, max_judge_pair_fraction, kept, report)

    return _made(
        output, rows, IterationReport(max_score=max_score), candidates, judgments, *filter(None, [judge_pairs]),
        prompts=prompts, min_pair_fraction=min_pair_fraction, length_control=length_control, max_judge_pair_fraction=max_judge_pair_fraction,
    )  # fmt: skip


def _made(
    output: str,
    rows: Callable[[IterationReport], Iterable[JsonObject]],
    report: IterationReport,
    *inputs: str,
    prompts: Any,
    min_pair_fraction: float = 0.0,
    **settings: Any,
) -> Path:
    """A file of rows and its report, made by one rank for all; not made again.

    Args:
        rows: makes them, and feeds the report.
        inputs: files that they are made of.
        min_pair_fraction: of prompts that must give a row, and one in any case.
        settings: what else they depend on.
    """
    path = Path(output).expanduser()
    from aligner.backend.distributed import rank_zero_first

    with rank_zero_first() as first:
        if first:
            if min_pair_fraction:
                settings = {"min_pair_fraction": min_pair_fraction, **settings}
            made = _journal(path, *inputs, prompts=prompts, **settings)
            if made.check_finished():
                log_rank0(f"{path} is there, whole")
                return path
            found = list(rows(report))
            report.write(path)
            if report.pairs < max(1.0, min_pair_fraction * report.prompts):
                wanted = (
                    f"fewer than min_pair_fraction={min_pair_fraction}"
                    if report.pairs
                    else "and one is needed at least"
                )
                raise SanityCheckError(
                    f"{report.pairs} of {report.prompts} prompts give a row, {wanted}: {report.why()}. "
                    f"Look at {path}.report.html; a judge that tells answers apart, more samples or a higher "
                    "temperature help"
                )
            made.write_all(found)
    return path


def _journal(path: Path, *inputs: str, prompts: Any, **settings: Any) -> journal.Journal:
    """What the rows are made of: the content of files, and settings."""
    asked = hashing.short_hash(repr([(p.id, p.row) for p in read_prompts(prompts)]).encode())
    for name in inputs:
        if not Path(name).expanduser().is_file():
            raise RowError(f"{name}: no such file; it is made by the stage before")
    return journal.Journal(path, {"of": {"prompts": asked, "answers": hashing.files_hash(*inputs)}, **settings})


def _pair(prompt: Prompt, chosen: Candidate, rejected: Candidate) -> JsonObject:
    return {
        "prompt": prompt.prompt,
        "chosen_response": chosen.text,
        "rejected_response": rejected.text,
        "chosen_reward": chosen.score,
        "rejected_reward": rejected.score,
        "chosen_key": chosen.key,
        "rejected_key": rejected.key,
    }


def _capped(judge_pairs: str | None, share: float, answers: int, report: IterationReport) -> list[JsonObject]:
    """Pairs of the judging task, as many as make up at most `share` of all rows."""
    if judge_pairs is None:
        return []
    found = list(journal.read(Path(judge_pairs).expanduser()))
    report.compared = report_of(Path(judge_pairs).expanduser())
    kept = min(len(found), int(share * answers / (1 - share) + 1e-9))
    report.judge_pairs, report.judge_pairs_left_out = kept, len(found) - kept
    # By turns of their scores, so that no score takes a larger share than it had.
    turns: dict[float, list[JsonObject]] = {}
    for row in random.Random(0).sample(found, len(found)):
        turns.setdefault(round(row.get("chosen_score", 0.0)), []).append(row)
    by_turn = [row for rows in itertools.zip_longest(*(turns[score] for score in sorted(turns))) for row in rows if row]
    return by_turn[:kept]


def _answered(source: Any, candidates: str, judgments: str | None, report: IterationReport) -> Any:
    """Each prompt with its answers and their scores."""
    scores: dict[str, list[float]] = {}
    for row in journal.read(Path(judgments).expanduser(), ("key", "score")) if judgments else ():
        report.judged(row)
        if row["score"] is not None:
            scores.setdefault(parent_key(row["key"]), []).append(row["score"])
    held = list(journal.read(Path(candidates).expanduser(), ANSWER))
    # The same answer to the same prompt was judged once.
    by_text = {_said(row): scores[row["key"]] for row in held if row["key"] in scores}
    answers: dict[str, list[Candidate]] = {}
    for row in held:
        candidate = Candidate(
            key=row["key"],
            text=row["response"],
            length=row["num_tokens"],
            ended=row["finish_reason"] == "stop" and bool(row["response"].strip()),
            scores=tuple(by_text.get(_said(row), ())),
        )
        report.answered(row)
        answers.setdefault(parent_key(row["key"]), []).append(candidate)
    for name, file in (("answers", candidates), ("judgments", judgments)):
        if file is not None:
            report.timed(name, speed_of(Path(file).expanduser()))
    asked = PromptIndex(source, candidates)
    return [(asked.prompt(found[0].key), found) for found in answers.values()]


def _said(row: JsonObject) -> tuple[str, str]:
    """The prompt's id and the answer."""
    return parent_key(row["key"]), row["response"]


def spin_pairs(prompts: Union[str, list[str]], candidates: str, output: str) -> Path:
    """Make pairs of a given answer and the model's own (self-play fine-tuning, Chen et al. 2024, arXiv 2401.01335).

    Chosen is the prompt's `response`, or the answer that follows its last user message; rejected the model's first
    answer that ended properly and is another.

    Args:
        prompts: the file that was answered, with `response` or `messages`.
        candidates: what `generate-responses` wrote.
        output: the file of pairs to write.

    Raises:
        RowError: a prompt has no given answer.
        GateError: no pair is left.
    """

    def rows(report: IterationReport) -> Iterator[JsonObject]:
        for prompt, answers in _answered(prompts, candidates, None, report):
            given = _given(prompt)
            other = next((a for a in answers if a.ended and a.text.strip() != given.strip()), None)
            report.count("pair" if other else "unended" if not any(a.ended for a in answers) else "identical")
            if other:
                yield {"prompt": prompt.prompt, "chosen_response": given, "rejected_response": other.text}

    return _made(output, rows, IterationReport(), candidates, prompts=prompts)


def _given(prompt: Prompt) -> str:
    """The answer that a line of prompts holds."""
    row = prompt.row
    answer = row.get("response")
    if answer is None and isinstance(row.get("messages"), list) and len(row["messages"]) > len(prompt.prompt):
        answer = row["messages"][len(prompt.prompt)]
    if isinstance(answer, list) and answer:
        answer = answer[0]
    text = answer.get("content") if isinstance(answer, dict) else answer
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{prompt.source}: has no 'response' that spin could choose over the model's own")
    return text


def best_responses(
    prompts: Union[str, list[str]],
    candidates: str,
    judgments: str,
    output: str,
    score_threshold: Optional[float] = None,
) -> Path:
    """Keep the best answer to each prompt for supervised fine-tuning (rejection sampling).

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        judgments: what `judge-responses` wrote.
        output: the file of demonstrations to write.
        score_threshold: a score that the best must have; None: whatever it has.

    Raises:
        RowError: a file does not hold what it should.
        GateError: none is left.
    """

    def rows(report: IterationReport) -> Iterator[JsonObject]:
        for prompt, answers in _answered(prompts, candidates, judgments, report):
            found = best(answers)
            good = found is not None and (score_threshold is None or found.score >= score_threshold)
            report.count("pair" if good else "unscored" if found is None else "below")
            if good and found is not None:
                yield {"prompt": prompt.prompt, "response": found.text, "score": found.score}

    return _made(
        output, rows, IterationReport(), candidates, judgments, prompts=prompts, score_threshold=score_threshold
    )
