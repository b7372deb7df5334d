"""From judged answers to rows that are trained on: pairs of self-rewarding, of `spin`, the best of several.

Each is a stage: files in, a file of rows out, and beside it a report of what became of the prompts
(`aligner.round_report`).
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

from aligner import journal, naming
from aligner.asking import speed_of
from aligner.console import say
from aligner.errors import ConfigError, GateError, RowError
from aligner.journal import Row
from aligner.meta_judge import report_of
from aligner.prompts import Answered, Prompt, above, read_prompts
from aligner.round_report import RoundReport
from aligner.selection import Candidate, best, check_control, select

ANSWER = ("key", "response", "tokens", "finish")
"""What a line of answers must hold."""


def select_pairs(
    prompts: Union[str, list[str]],
    candidates: str,
    judgements: str,
    output: str,
    length_control: float = 0.0,
    judge_pairs: Optional[str] = None,
    judge_share: float = 0.15,
    least_share: float = 0.05,
    high: float = 5.0,
) -> Path:
    """Make a pair of each prompt's best and worst answer (`aligner.selection`).

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        judgements: what `judge-responses` wrote.
        output: the file of pairs to write, with `chosen_reward` and `rejected_reward`; `output.report.json` and
            `output.report.html` say how it went.
        length_control: ρ, from 0 to below 0.5.
        judge_pairs: pairs of the judging task that `meta-judge` wrote, to be trained on, too.
        judge_share: of all rows, at most; more are left out at random.
        least_share: of prompts that give a pair; if fewer do, the run stops.
        high: the judge's highest score, to tell when it gives nothing else.

    Returns:
        The output.

    Raises:
        RowError: a file does not hold what it should.
        GateError: too few pairs are left to learn from.
    """
    check_control(length_control)
    if not 0 <= judge_share < 1:
        raise ConfigError(f"judge_share: must be from 0 to below 1, found {judge_share}")

    def rows(report: RoundReport) -> Iterator[Row]:
        kept = 0
        for prompt, answers in _answered(prompts, candidates, judgements, report):
            found = select(answers, length_control=length_control)
            report.add(prompt, answers, found)
            if found.chosen and found.rejected:
                kept += 1
                yield _pair(prompt, found.chosen, found.rejected)
        yield from _capped(judge_pairs, judge_share, kept, report)

    return _made(
        output, rows, RoundReport(high=high), candidates, judgements, *filter(None, [judge_pairs]),
        prompts=prompts, least_share=least_share, length_control=length_control, judge_share=judge_share,
    )  # fmt: skip


def _made(
    output: str,
    rows: Callable[[RoundReport], Iterable[Row]],
    report: RoundReport,
    *inputs: str,
    prompts: Any,
    least_share: float = 0.0,
    **settings: Any,
) -> Path:
    """A file of rows and its report, made by one rank for all; not made again.

    Args:
        rows: makes them, and feeds the report.
        inputs: files that they are made of.
        least_share: of prompts that must give a row, and one in any case.
        settings: what else they depend on.
    """
    path = Path(output).expanduser()
    from aligner.process import together

    with together() as first:
        if first:
            if least_share:
                settings = {"least_share": least_share, **settings}
            made = _journal(path, *inputs, prompts=prompts, **settings)
            if made.finished:
                say(f"{path} is there, whole")
                return path
            found = list(rows(report))
            report.write(path)
            if report.pairs < max(1.0, least_share * report.prompts):
                wanted = f"fewer than least_share={least_share}" if report.pairs else "and one is needed at least"
                raise GateError(
                    f"{report.pairs} of {report.prompts} prompts give a row, {wanted}: {report.why()}. "
                    f"Look at {path}.report.html; a judge that tells answers apart, more samples or a higher "
                    "temperature help"
                )
            made.put(found)
    return path


def _journal(path: Path, *inputs: str, prompts: Any, **settings: Any) -> journal.Journal:
    """What the rows are made of: the content of files, and settings."""
    asked = naming.short_hash(repr([(p.id, p.row) for p in read_prompts(prompts)]).encode())
    for name in inputs:
        if not Path(name).expanduser().is_file():
            raise RowError(f"{name}: no such file; it is made by the stage before")
    return journal.Journal(path, {"of": {"prompts": asked, "answers": naming.files_hash(*inputs)}, **settings})


def _pair(prompt: Prompt, chosen: Candidate, rejected: Candidate) -> Row:
    return {
        "prompt": prompt.prompt,
        "chosen_response": chosen.text,
        "rejected_response": rejected.text,
        "chosen_reward": chosen.score,
        "rejected_reward": rejected.score,
        "chosen_key": chosen.key,
        "rejected_key": rejected.key,
    }


def _capped(judge_pairs: str | None, share: float, answers: int, report: RoundReport) -> list[Row]:
    """Pairs of the judging task, as many as make up at most `share` of all rows."""
    if judge_pairs is None:
        return []
    found = list(journal.read(Path(judge_pairs).expanduser()))
    report.compared = report_of(Path(judge_pairs).expanduser())
    kept = min(len(found), int(share * answers / (1 - share) + 1e-9))
    report.judge_pairs, report.judge_pairs_left_out = kept, len(found) - kept
    # By turns of their scores, so that no score takes a larger share than it had.
    turns: dict[float, list[Row]] = {}
    for row in random.Random(0).sample(found, len(found)):
        turns.setdefault(round(row.get("chosen_score", 0.0)), []).append(row)
    by_turn = [row for rows in itertools.zip_longest(*(turns[score] for score in sorted(turns))) for row in rows if row]
    return by_turn[:kept]


def _answered(source: Any, candidates: str, judgements: str | None, report: RoundReport) -> Any:
    """Each prompt with its answers and their scores."""
    scores: dict[str, list[float]] = {}
    for row in journal.read(Path(judgements).expanduser(), ("key", "score")) if judgements else ():
        report.judged(row)
        if row["score"] is not None:
            scores.setdefault(above(row["key"]), []).append(row["score"])
    held = list(journal.read(Path(candidates).expanduser(), ANSWER))
    # The same answer to the same prompt was judged once.
    by_text = {_said(row): scores[row["key"]] for row in held if row["key"] in scores}
    answers: dict[str, list[Candidate]] = {}
    for row in held:
        candidate = Candidate(
            key=row["key"],
            text=row["response"],
            length=row["tokens"],
            ended=row["finish"] == "stop" and bool(row["response"].strip()),
            scores=tuple(by_text.get(_said(row), ())),
        )
        report.answered(row)
        answers.setdefault(above(row["key"]), []).append(candidate)
    for name, file in (("answers", candidates), ("judgements", judgements)):
        if file is not None:
            report.timed(name, speed_of(Path(file).expanduser()))
    asked = Answered(source, candidates)
    return [(asked.prompt(found[0].key), found) for found in answers.values()]


def _said(row: Row) -> tuple[str, str]:
    """The prompt's id and the answer."""
    return above(row["key"]), row["response"]


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

    def rows(report: RoundReport) -> Iterator[Row]:
        for prompt, answers in _answered(prompts, candidates, None, report):
            given = _given(prompt)
            other = next((a for a in answers if a.ended and a.text.strip() != given.strip()), None)
            report.count("pair" if other else "unended" if not any(a.ended for a in answers) else "identical")
            if other:
                yield {"prompt": prompt.prompt, "chosen_response": given, "rejected_response": other.text}

    return _made(output, rows, RoundReport(), candidates, prompts=prompts)


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
    prompts: Union[str, list[str]], candidates: str, judgements: str, output: str, at_least: Optional[float] = None
) -> Path:
    """Keep the best answer to each prompt for supervised fine-tuning (rejection sampling).

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        judgements: what `judge-responses` wrote.
        output: the file of demonstrations to write.
        at_least: a score that the best must have; None: whatever it has.

    Raises:
        RowError: a file does not hold what it should.
        GateError: none is left.
    """

    def rows(report: RoundReport) -> Iterator[Row]:
        for prompt, answers in _answered(prompts, candidates, judgements, report):
            found = best(answers)
            good = found is not None and (at_least is None or found.score >= at_least)
            report.count("pair" if good else "unscored" if found is None else "below")
            if good and found is not None:
                yield {"prompt": prompt.prompt, "response": found.text, "score": found.score}

    return _made(output, rows, RoundReport(), candidates, judgements, prompts=prompts, at_least=at_least)
