"""How good a policy's likeliest answers to held-out prompts are, by the judge that its training used."""

import json
import statistics
from pathlib import Path
from typing import Union

from aligner import journal
from aligner.console import say
from aligner.engines import Engine
from aligner.files import written_whole
from aligner.generation import generate_responses
from aligner.judge import Judge, judge_responses
from aligner.prompts import above


def _mean(scores: list[list[float]]) -> float:
    """Of the means of those that there are."""
    known = [statistics.fmean(each) for each in scores if each]
    return statistics.fmean(known) if known else 0.0


def evaluate(prompts: Union[str, list[str]], output: str, engine: Engine, judge: Judge, max_tokens: int = 512) -> Path:
    """Answer prompts greedily and judge the answers; run again, it goes on where it was.

    Args:
        prompts: held-out prompts.
        output: a JSON file to write: `score` (mean of the answers' mean scores, 0 for one that did not end, without
            those whose judgements cannot be read), `ended`, `answers`, `length` (tokens); the answers and judgements
            are beside it.
        engine: who answers.
        judge: who judges.
        max_tokens: of an answer.

    Returns:
        The output.
    """
    path = Path(output).expanduser()
    answers, judgements = (path.with_name(f"{path.stem}.{name}.jsonl") for name in ("answers", "judgements"))
    generate_responses(prompts, str(answers), engine, samples=1, temperature=0, max_tokens=max_tokens)
    judge_responses(prompts, str(answers), str(judgements), judge)
    from aligner.process import together

    with together() as first:
        if first:
            scores: dict[str, list[float]] = {}
            for row in journal.read(judgements):
                if row["score"] is not None:
                    scores.setdefault(above(row["key"]), []).append(row["score"])
            held = list(journal.read(answers))
            told = {
                # One that did not end was not judged; one whose judgements cannot be read says nothing.
                "score": _mean([[0.0] if row["finish"] != "stop" else scores.get(row["key"], []) for row in held]),
                "ended": sum(row["finish"] == "stop" for row in held),
                "answers": len(held),
                "length": statistics.fmean(row["tokens"] for row in held),
            }
            with written_whole(path) as partial:
                partial.write_text(json.dumps(told))
            say(f"{path.name}: score {told['score']:.4f} over {told['answers']} answers, {told['ended']} of them ended")
    return path
