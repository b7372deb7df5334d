"""Putting many questions to an engine and keeping the answers: each question's once, whatever is killed in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from aligner.console import is_first_rank, say
from aligner.engines import Answer, Engine, Question
from aligner.errors import RowError
from aligner.journal import Journal, Row, append
from aligner.sampling import Sampling

NO_ROOM = "no_room"
"""Why a question has no answer: the engine has no room for it."""


def ask(
    journal: Journal,
    engine: Engine,
    questions: Sequence[Question],
    sampling: Sampling,
    row: Callable[[Question, Answer], Row],
    *,
    refuse_long: bool,
    cache: Path,
) -> None:
    """Have the journal hold a row for each question, with its `key`, in the order of the questions.

    Every rank calls. Those that there is no room for have an empty answer that finished as `no_room`.

    Args:
        row: what is kept of an answer.
        refuse_long: raise where there is no room for a question.
        cache: where the engine keeps what it makes once.

    Raises:
        RowError: a question is too long, or cannot be one.
        UserError: what the engine says, or the journal.
    """
    if journal.finished:
        say(f"{journal.path} is there, whole")
        return
    with engine.opened(cache):
        share = engine.share
        if share is None:
            return
        long = _too_long(engine, questions, sampling, refuse=refuse_long)
        if is_first_rank():
            journal.begin()
        engine.barrier()
        done = {held["key"] for held in journal.rows()}
        engine.barrier()
        mine = [q for q in questions[share[0] :: share[1]] if q.key not in done]
        if engine.speaks:
            with journal.appending(share[0]) as file, _progress(journal, len(questions), len(done), share) as bar:
                for question in mine:
                    if question.source in long:
                        append(file, row(question, Answer(key=question.key, text="", tokens=0, finish=NO_ROOM)))
                asked = {q.key: q for q in mine if q.source not in long}
                for answer in engine.answers(list(asked.values()), sampling):
                    append(file, row(asked[answer.key], answer))
                    bar.update()
        else:
            for _ in engine.answers([q for q in mine if q.source not in long], sampling):
                pass
        engine.barrier()
        if is_first_rank():
            order = {q.key: i for i, q in enumerate(questions)}
            made = [held["key"] for held in journal.rows()]
            assert len(made) == len(order) and set(made) == order.keys(), "a question was lost, repeated, or made up"
            journal.finish(lambda held: order[held["key"]])
        engine.barrier()


def _too_long(engine: Engine, questions: Sequence[Question], sampling: Sampling, *, refuse: bool) -> set[str]:
    """The sources of questions that there is no room for; all questions of one source ask the same."""
    once = {q.source: q for q in questions}
    long = engine.too_long(list(once.values()), sampling)
    if long and refuse:
        shown = "; ".join(f"{q.source}: {why}" for q, why in long[:5]) + ("; ..." if len(long) > 5 else "")
        raise RowError(
            f"{len(long)} of {len(once)} prompts are too long: {shown}. Shorten or drop them, or lower max_tokens"
        )
    if long:
        say(f"{len(long)} of {len(once)} questions are too long and stay without an answer, first {long[0][0].source}")
    return {q.source for q, _ in long}


def _progress(journal: Journal, count: int, done: int, share: tuple[int, int]) -> tqdm:  # type: ignore[type-arg]
    """This process's part, which stands for the others'."""
    part, parts = share
    return tqdm(
        desc=journal.path.name, total=-(-count // parts), initial=done // parts, unit="answer", disable=part > 0
    )
