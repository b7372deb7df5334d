"""Evaluation of a policy: greedy responses to held-out prompts, scored by the judge of its training."""

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
    """Return the mean of the means of non-empty lists; 0 without any."""
    means = [statistics.fmean(values) for values in scores if values]
    return statistics.fmean(means) if means else 0.0


def evaluate(prompts: Union[str, list[str]], output: str, engine: Engine, judge: Judge, max_tokens: int = 512) -> Path:
    """Generate greedy responses and judge them. If an output file is incomplete, evaluation resumes.

    Args:
        prompts: held-out prompts.
        output: JSON file to write: `score`, `ended` (number of complete responses), `answers` (number of responses),
            `length` (mean tokens). `score` is the mean over responses of their mean scores; an incomplete response
            scores 0, a response without a parsed judgment is left out. Responses and judgments are beside the file.
        engine: generation backend of the policy.
        judge: `ModelJudge` or `Verifier`.
        max_tokens: maximum number of tokens of a response.

    Returns:
        The output.
    """
    path = Path(output).expanduser()
    responses, judgments = (path.with_name(f"{path.stem}.{name}.jsonl") for name in ("answers", "judgments"))
    generate_responses(prompts, str(responses), engine, num_generations=1, temperature=0, max_tokens=max_tokens)
    judge_responses(prompts, str(responses), str(judgments), judge)
    from aligner.backend.distributed import rank_zero_first

    with rank_zero_first() as first:
        if first:
            scores: dict[str, list[float]] = {}
            for row in journal.read(judgments):
                if row["score"] is not None:
                    scores.setdefault(parent_key(row["key"]), []).append(row["score"])
            rows = list(journal.read(responses))
            result = {
                # An incomplete response was not judged; one without a parsed judgment is left out.
                "score": _mean(
                    [[0.0] if row["finish_reason"] != "stop" else scores.get(row["key"], []) for row in rows]
                ),
                "ended": sum(row["finish_reason"] == "stop" for row in rows),
                "answers": len(rows),
                "length": statistics.fmean(row["num_tokens"] for row in rows),
            }
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(result))
            log_rank0(
                f"{path.name}: score {result['score']:.4f} over {result['answers']} responses, "
                f"{result['ended']} complete"
            )
    return path
