"""Putting many questions to an engine and keeping the answers: each question's once, whatever is killed in between."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from aligner.common.console import is_first_rank, log_rank0
from aligner.common.errors import RowError
from aligner.common.files import atomic_write
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.journal import Journal, JsonObject, append
from aligner.generate.sampling import Sampling

NO_ROOM = "no_room"
"""Why a question has no answer: the engine has no room for it."""


def generate_to_file(
    journal: Journal,
    engine: Engine,
    questions: Sequence[GenerationRequest],
    sampling: Sampling,
    row: Callable[[GenerationRequest, GenerationResult], JsonObject],
    *,
    refuse_long: bool,
    cache: Path,
) -> None:
    """Have the journal hold a row for each question, with its `key`, in the order of the questions.

    Every rank calls. Those that there is no room for have an empty answer that finished as `no_room`. How fast it went
    is kept beside the journal (`speed_of`).

    Args:
        row: what is kept of an answer.
        refuse_long: raise where there is no room for a question.
        cache: where the engine keeps what it makes once.

    Raises:
        RowError: a question is too long, or cannot be one.
        UserError: what the engine says, or the journal.
    """
    if journal.check_finished():
        log_rank0(f"{journal.path} is there, whole")
        return
    with engine.session(cache):
        share = engine.shard
        if share is None:
            return
        long = _too_long(engine, questions, sampling, refuse=refuse_long)
        if is_first_rank():
            journal.begin()
        engine.barrier()
        done = {held["key"] for held in journal.rows()}
        engine.barrier()
        began = time.monotonic()
        mine = _mine([q for q in questions if q.key not in done], *share)
        if engine.is_writer:
            with journal.appending(share[0]) as file, _progress(journal, len(questions), len(done), share) as bar:
                for question in mine:
                    if question.source in long:
                        append(
                            file,
                            row(
                                question,
                                GenerationResult(key=question.key, text="", num_tokens=0, finish_reason=NO_ROOM),
                            ),
                        )
                asked = {q.key: q for q in mine if q.source not in long}
                for answer in engine.generate(list(asked.values()), sampling):
                    append(file, row(asked[answer.key], answer))
                    bar.update()
        else:
            for _ in engine.generate([q for q in mine if q.source not in long], sampling):
                pass
        engine.barrier()
        if is_first_rank():
            order = {q.key: i for i, q in enumerate(questions)}
            rows = journal.rows()
            made = [held["key"] for held in rows]
            assert len(made) == len(order) and set(made) == order.keys(), "a question was lost, repeated, or made up"
            _keep_speed(journal.path, [held for held in rows if held["key"] not in done], time.monotonic() - began)
            journal.finish(lambda held: order[held["key"]])
        engine.barrier()


def _mine(left: Sequence[GenerationRequest], part: int, parts: int) -> list[GenerationRequest]:
    """The share of a process: questions with one source stay together, which ask the same and are read once."""
    groups = [list(group) for _, group in itertools.groupby(left, key=lambda q: q.source)]
    dealt = groups if len(groups) >= parts else [[q] for q in left]
    return [q for group in dealt[part::parts] for q in group]


def speed_of(path: Path) -> dict[str, float]:
    """How fast the job that finished a file wrote its part of it: `generate` and `tokens` per second of all ranks.

    Empty for a file that somebody else made.
    """
    held = _speed_file(path)
    return json.loads(held.read_text()) if held.is_file() else {}


def _speed_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.speed.json")


def _keep_speed(path: Path, rows: list[JsonObject], seconds: float) -> None:
    if not rows:
        return
    tokens = sum(row["num_tokens"] for row in rows)
    told = {"answers": len(rows) / seconds, "tokens": tokens / seconds}
    with atomic_write(_speed_file(path)) as partial:
        partial.write_text(json.dumps(told))
    log_rank0(
        f"{path.name}: {len(rows)} answers of {tokens / len(rows):.0f} tokens on average in {seconds:.0f} s, "
        f"{told['answers']:.3g} answers and {told['tokens']:.3g} tokens a second"
    )


def _too_long(engine: Engine, questions: Sequence[GenerationRequest], sampling: Sampling, *, refuse: bool) -> set[str]:
    """The sources of questions that there is no room for; all questions of one source ask the same."""
    once = {q.source: q for q in questions}
    long = engine.too_long(list(once.values()), sampling)
    if long and refuse:
        shown = "; ".join(f"{q.source}: {why}" for q, why in long[:5]) + ("; ..." if len(long) > 5 else "")
        raise RowError(
            f"{len(long)} of {len(once)} prompts are too long: {shown}. Shorten or drop them, or lower max_tokens"
        )
    if long:
        log_rank0(
            f"{len(long)} of {len(once)} questions are too long and stay without an answer, first {long[0][0].source}"
        )
    return {q.source for q, _ in long}


def _progress(journal: Journal, count: int, done: int, share: tuple[int, int]) -> tqdm:  # type: ignore[type-arg]
    """This process's part, which stands for the others'."""
    part, parts = share
    return tqdm(
        desc=journal.path.name, total=-(-count // parts), initial=done // parts, unit="answer", disable=part > 0
    )
