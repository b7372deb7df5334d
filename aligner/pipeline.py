"""Self-rewarding: rounds of generating, judging, selecting and aligning; each stage reads and writes files.

    NAME/start/                        the supervised stage before the first round, if there is one
    NAME/iteration-1/candidates.jsonl  answers            (aligner.generation)
    NAME/iteration-1/judgements.jsonl  scores             (aligner.judge)
    NAME/iteration-1/judge_pairs.jsonl pairs of judgements, with a meta-judge (aligner.meta_judge)
    NAME/iteration-1/train.jsonl       pairs, and a report (aligner.choosing)
    NAME/iteration-1/policy/           a run of `align` that starts from, and is held to, the policy before
    NAME/iteration-1/score.json        its answers to held-out prompts (aligner.evaluation)

A file that is there is not made again, so what a person wrote may take the place of any of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from aligner.console import say

if TYPE_CHECKING:
    import nemo_run as run

Stage = Callable[[], Path]


@dataclass(kw_only=True)
class Round:
    """The stages of one iteration, in order; None where there is no such stage."""

    generate: Stage
    judge: Optional[Stage] = None
    meta: Optional[Stage] = None
    select: Stage
    align: Stage
    evaluate: Optional[Stage] = None


def self_reward(output: str, rounds: list[Round], start: Optional[Stage] = None) -> Path:
    """Do all stages one after another in this job; run again, it goes on where it was.

    Args:
        output: the pipeline's folder, in which its recipe puts everything.
        rounds: what is done in each iteration.
        start: a run before the first one.

    Returns:
        The folder of the last policy.

    Raises:
        GateError: a round leaves too few pairs to learn from.
        SystemExit: with code 75; the job was told to end, has saved, and is to be run again.
    """
    from aligner.console import plain_errors

    plain_errors()
    if start is not None:
        start()
    policy = Path(output)
    for i, one in enumerate(rounds, start=1):
        for part in fields(Round):
            stage: Stage | None = getattr(one, part.name)
            if stage is None:
                continue
            say(f"iteration {i} of {len(rounds)}: {part.name}")
            made = stage()
            policy = made if part.name == "align" else policy
    say(f"scores of held-out answers by iteration: {scores(Path(output))}")
    return policy


def scores(folder: Path) -> list[float]:
    """Of the policies of a pipeline, in order, as far as they were evaluated."""
    found = sorted(folder.glob("iteration-*/score.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return [json.loads(path.read_text())["score"] for path in found]


def stages(recipe: "run.Partial") -> dict[str, "run.Partial"]:
    """The stages of a recipe of `self_reward` by name, to be launched as jobs that depend on each other.

    executors.launch(pipeline.stages(recipe), executors.slurm(...), name="self_rewarding")
    """
    found: dict[str, Any] = {}
    asked: Any = recipe
    if getattr(asked, "start", None) is not None:
        found["start"] = asked.start
    for i, one in enumerate(asked.rounds, start=1):
        for part in fields(Round):
            if getattr(one, part.name, None) is not None:
                found[f"iteration-{i}-{part.name}"] = getattr(one, part.name)
    return found
