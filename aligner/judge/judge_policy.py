"""How good a policy's likeliest answers to held-out prompts are, by the judge that its training used."""

import json
import statistics
from pathlib import Path
from typing import Union

from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.data.prompts import parent_key
from aligner.generate import journal
from aligner.generate.engine import Engine
from aligner.generate.generation import generate_responses
from aligner.judge.judges import Judge, judge_responses


def _mean(scores: list[list[float]]) -> float:
    """Of the means of those that there are."""
    known = [statistics.fmean(each) for each in scores if each]
    return statistics.fmean(known) if known else 0.0


def evaluate(prompts: Union[str, list[str]], output: str, engine: Engine, judge: Judge, max_tokens: int = 512) -> Path:
    """Answer prompts greedily and judge the answers; run again, it goes on where it was.

    Args:
        prompts: held-out prompts.
        output: a JSON file to write: `score` (mean of the answers' mean scores, 0 for one that did not end, without
            those whose judgments cannot be read), `ended`, `answers`, `length` (tokens); the answers and judgments
            are beside it.
        engine: who answers.
        judge: who judges.
        max_tokens: of an answer.

    Returns:
        The output.
    """
    path = Path(output).expanduser()
    answers, judgments = (path.with_name(f"{path.stem}.{name}.jsonl") for name in ("answers", "judgments"))
    generate_responses(prompts, str(answers), engine, num_generations=1, temperature=0, max_tokens=max_tokens)
    judge_responses(prompts, str(answers), str(judgments), judge)
    from aligner.backend.distributed import rank_zero_first

    with rank_zero_first() as first:
        if first:
            scores: dict[str, list[float]] = {}
            for row in journal.read(judgments):
                if row["score"] is not None:
                    scores.setdefault(parent_key(row["key"]), []).append(row["score"])
            held = list(journal.read(answers))
            told = {
                # One that did not end was not judged; one whose judgments cannot be read says nothing.
                "score": _mean(
                    [[0.0] if row["finish_reason"] != "stop" else scores.get(row["key"], []) for row in held]
                ),
                "ended": sum(row["finish_reason"] == "stop" for row in held),
                "answers": len(held),
                "length": statistics.fmean(row["num_tokens"] for row in held),
            }
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(told))
            log_rank0(
                f"{path.name}: score {told['score']:.4f} over {told['answers']} answers, {told['ended']} of them ended"
            )
    return path
