"""Training rows from judged responses: pairs for self-rewarding and SPIN, best-of-n demonstrations.

Each function is a stage: it reads files and writes a file of rows, with a report beside it
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
from aligner.judge.meta_judge import report_of, stated_score
from aligner.judge.selection import Candidate, best, check_control, select

RESPONSE_KEYS = ("key", "response", "num_tokens", "finish_reason")
"""Required keys of a line of responses."""


def select_pairs(
    prompts: Union[str, list[str]],
    candidates: str,
    judgments: str,
    output: str,
    length_control: float = 0.0,
    judge_pairs: Optional[str] = None,
    max_judge_pair_fraction: Optional[float] = 0.15,
    min_pair_fraction: float = 0.05,
    max_score: float = 5.0,
) -> Path:
    """Pair the best and the worst response to each prompt (`aligner.judge.selection`).

    Args:
        prompts: prompts of the candidates.
        candidates: output of `generate-responses`.
        judgments: output of `judge-responses`.
        output: file of pairs to write, with `chosen_reward` and `rejected_reward`. The reports are
            `output.report.json` and `output.report.html`.
        length_control: ρ, in [0, 0.5); 0 ignores length.
        judge_pairs: pairs of the judging task, the output of `meta-judge`, to add to the rows.
        max_judge_pair_fraction: maximum fraction of judge pairs among all rows; excess pairs are dropped at random.
            None: no limit.
        min_pair_fraction: minimum fraction of prompts with a pair; below it the run stops.
        max_score: the judge's highest score, for a warning when most judgments give it.

    Returns:
        The output.

    Raises:
        RowError: an input file is missing, or a line is invalid.
        ConfigError: an argument is invalid, or the output was made with other settings.
        SanityCheckError: too few prompts give a pair.
    """
    check_control(length_control)
    if max_judge_pair_fraction is not None and not 0 <= max_judge_pair_fraction < 1:
        raise ConfigError(f"max_judge_pair_fraction: must be from 0 to below 1, found {max_judge_pair_fraction}")

    def rows(report: IterationReport) -> Iterator[JsonObject]:
        num_pairs = 0
        for prompt, responses in _scored_responses(prompts, candidates, judgments, report):
            selection = select(responses, length_control=length_control)
            report.add(prompt, responses, selection)
            if selection.chosen and selection.rejected:
                num_pairs += 1
                yield _pair(prompt, selection.chosen, selection.rejected)
        yield from _limited_judge_pairs(judge_pairs, max_judge_pair_fraction, num_pairs, report)

    return _write_rows(
        output,
        rows,
        IterationReport(max_score=max_score),
        candidates,
        judgments,
        *filter(None, [judge_pairs]),
        prompts=prompts,
        min_pair_fraction=min_pair_fraction,
        length_control=length_control,
        max_judge_pair_fraction=max_judge_pair_fraction,
    )


def _write_rows(
    output: str,
    rows: Callable[[IterationReport], Iterable[JsonObject]],
    report: IterationReport,
    *inputs: str,
    prompts: Any,
    min_pair_fraction: float = 0.0,
    **settings: Any,
) -> Path:
    """Write a file of rows and its report on rank 0, unless the file is complete.

    Args:
        rows: makes the rows and fills the report.
        inputs: files that the rows depend on.
        min_pair_fraction: minimum fraction of prompts with a row; one row is required in any case.
        settings: other arguments that the rows depend on.

    Raises:
        SanityCheckError: too few prompts give a row.
    """
    path = Path(output).expanduser()
    from aligner.backend.distributed import rank_zero_first

    with rank_zero_first() as first:
        if first:
            if min_pair_fraction:
                settings = {"min_pair_fraction": min_pair_fraction, **settings}
            output_journal = _journal(path, *inputs, prompts=prompts, **settings)
            if output_journal.check_finished():
                log_rank0(f"{path} is complete; skipping this stage")
                return path
            written_rows = list(rows(report))
            report.write(path)
            if report.pairs < max(1.0, min_pair_fraction * report.prompts):
                shortfall = (
                    f"fewer than min_pair_fraction={min_pair_fraction}"
                    if report.pairs
                    else "and one is needed at least"
                )
                raise SanityCheckError(
                    f"{report.pairs} of {report.prompts} prompts give a row, {shortfall}: {report.why()}. "
                    f"Look at {path}.report.html; a judge that separates responses, more samples or a higher "
                    "temperature help"
                )
            output_journal.write_all(written_rows)
    return path


def _journal(path: Path, *inputs: str, prompts: Any, **settings: Any) -> journal.Journal:
    """Return the journal of the rows; its settings include hashes of the input files."""
    prompts_hash = hashing.short_hash(repr([(p.id, p.row) for p in read_prompts(prompts)]).encode())
    for name in inputs:
        if not Path(name).expanduser().is_file():
            raise RowError(f"{name}: no such file; the stage before writes it")
    return journal.Journal(path, {"of": {"prompts": prompts_hash, "answers": hashing.files_hash(*inputs)}, **settings})


def _pair(prompt: Prompt, chosen: Candidate, rejected: Candidate) -> JsonObject:
    return {
        **prompt.as_row(),
        "chosen_response": chosen.text,
        "rejected_response": rejected.text,
        "chosen_reward": chosen.score,
        "rejected_reward": rejected.score,
        "chosen_key": chosen.key,
        "rejected_key": rejected.key,
    }


def _limited_judge_pairs(
    judge_pairs: str | None, max_fraction: float | None, num_pairs: int, report: IterationReport
) -> list[JsonObject]:
    """Return pairs of the judging task, at most `max_fraction` of all rows, if it is given."""
    if judge_pairs is None:
        return []
    pairs = list(journal.read(Path(judge_pairs).expanduser()))
    report.compared = report_of(Path(judge_pairs).expanduser())
    limit = len(pairs)
    if max_fraction is not None:
        limit = min(limit, int(max_fraction * num_pairs / (1 - max_fraction) + 1e-9))
    report.judge_pairs, report.judge_pairs_left_out = limit, len(pairs) - limit
    # Round-robin over scores: no score gets a larger share than it had.
    by_score: dict[int | None, list[JsonObject]] = {}
    for row in random.Random(0).sample(pairs, len(pairs)):
        by_score.setdefault(stated_score(row), []).append(row)
    scores = sorted(by_score, key=str)
    by_turn = [row for rows in itertools.zip_longest(*(by_score[score] for score in scores)) for row in rows if row]
    return by_turn[:limit]


def _scored_responses(source: Any, candidates: str, judgments: str | None, report: IterationReport) -> Any:
    """Return each prompt with its responses and their scores."""
    scores: dict[str, list[float]] = {}
    for row in journal.read(Path(judgments).expanduser(), ("key", "score")) if judgments else ():
        report.add_judgment(row)
        if row["score"] is not None:
            scores.setdefault(parent_key(row["key"]), []).append(row["score"])
    rows = list(journal.read(Path(candidates).expanduser(), RESPONSE_KEYS))
    # Identical responses to a prompt were judged once.
    by_text = {_response_id(row): scores[row["key"]] for row in rows if row["key"] in scores}
    responses: dict[str, list[Candidate]] = {}
    for row in rows:
        candidate = Candidate(
            key=row["key"],
            text=row["response"],
            length=row["num_tokens"],
            ended=row["finish_reason"] == "stop" and bool(row["response"].strip()),
            scores=tuple(by_text.get(_response_id(row), ())),
        )
        report.add_response(row)
        responses.setdefault(parent_key(row["key"]), []).append(candidate)
    for name, file in (("answers", candidates), ("judgments", judgments)):
        if file is not None:
            report.add_speed(name, speed_of(Path(file).expanduser()))
    prompt_index = PromptIndex(source, candidates)
    return [(prompt_index.prompt(group[0].key), group) for group in responses.values()]


def _response_id(row: JsonObject) -> tuple[str, str]:
    """Return the prompt's id and the response."""
    return parent_key(row["key"]), row["response"]


def spin_pairs(prompts: Union[str, list[str]], candidates: str, output: str) -> Path:
    """Pair reference responses with the model's own (self-play fine-tuning, SPIN, Chen et al. 2024, arXiv 2401.01335).

    Chosen is the prompt's `response`, or the message after its last user message. Rejected is the model's first
    complete response that differs from it.

    Args:
        prompts: prompts of the candidates, with `response` or `messages`.
        candidates: output of `generate-responses`.
        output: file of pairs to write.

    Returns:
        The output.

    Raises:
        RowError: a prompt has no reference response.
        SanityCheckError: no prompt gives a pair.
    """

    def rows(report: IterationReport) -> Iterator[JsonObject]:
        for prompt, responses in _scored_responses(prompts, candidates, None, report):
            reference = _reference_response(prompt)
            rejected = next((r for r in responses if r.ended and r.text.strip() != reference.strip()), None)
            report.count("pair" if rejected else "unended" if not any(r.ended for r in responses) else "identical")
            if rejected:
                yield {**prompt.as_row(), "chosen_response": reference, "rejected_response": rejected.text}

    return _write_rows(output, rows, IterationReport(), candidates, prompts=prompts)


def _reference_response(prompt: Prompt) -> str:
    """Return the reference response in a line of prompts."""
    row = prompt.row
    response = row.get("response")
    if response is None and isinstance(row.get("messages"), list) and len(row["messages"]) > len(prompt.prompt):
        response = row["messages"][len(prompt.prompt)]
    if isinstance(response, list) and response:
        response = response[0]
    text = response.get("content") if isinstance(response, dict) else response
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
    """Select the best response to each prompt for supervised fine-tuning (rejection sampling, best of n).

    Args:
        prompts: prompts of the candidates.
        candidates: output of `generate-responses`.
        judgments: output of `judge-responses`.
        output: file of demonstrations to write.
        score_threshold: minimum score of the best response; None: no minimum.

    Returns:
        The output.

    Raises:
        RowError: an input file is missing, or a line is invalid.
        SanityCheckError: no prompt gives a row.
    """

    def rows(report: IterationReport) -> Iterator[JsonObject]:
        for prompt, responses in _scored_responses(prompts, candidates, judgments, report):
            top = best(responses)
            accepted = top is not None and (score_threshold is None or top.score >= score_threshold)
            report.count("pair" if accepted else "unscored" if top is None else "below")
            if accepted and top is not None:
                yield {**prompt.as_row(), "response": top.text, "metadata": {"score": top.score}}

    return _write_rows(
        output, rows, IterationReport(), candidates, judgments, prompts=prompts, score_threshold=score_threshold
    )
