"""Self-rewarding: rounds of generating, judging, selecting and aligning; each stage reads and writes files.

    NAME/start/                        the supervised stage before the first round, if there is one
    NAME/iteration-1/candidates.jsonl  answers            (aligner.generate.generation)
    NAME/iteration-1/judgments.jsonl  scores             (aligner.judge.judges)
    NAME/iteration-1/judge_pairs.jsonl pairs of judgments, with a meta-judge (aligner.judge.meta_judge)
    NAME/iteration-1/train.jsonl       pairs, and a report (aligner.judge.build_pairs)
    NAME/iteration-1/policy/           a run of `align` that starts from, and is held to, the policy before
    NAME/iteration-1/score.json        its answers to held-out prompts (aligner.judge.judge_policy)

A file that is there is not made again, so what a person wrote may take the place of any of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from aligner.common.console import log_rank0

if TYPE_CHECKING:
    import nemo_run as run

Stage = Callable[[], Path]


@dataclass(kw_only=True)
class Iteration:
    """The stages of one iteration, in order; None where there is no such stage."""

    generate: Stage
    judge: Optional[Stage] = None
    meta_judge: Optional[Stage] = None
    select: Stage
    align: Stage
    evaluate: Optional[Stage] = None


def self_reward(output: str, iterations: list[Iteration], start: Optional[Stage] = None) -> Path:
    """Do all stages one after another in this job; run again, it goes on where it was.

    Args:
        output: the pipeline's folder, in which its recipe puts everything.
        iterations: what is done in each iteration.
        start: a run before the first one.

    Returns:
        The folder of the last policy.

    Raises:
        GateError: a round leaves too few pairs to learn from.
        SystemExit: with code 75; the job was told to end, has saved, and is to be run again.
    """
    from aligner.common.console import install_excepthook

    install_excepthook()
    if start is not None:
        start()
    policy = Path(output)
    for i, one in enumerate(iterations, start=1):
        for part in fields(Iteration):
            stage: Stage | None = getattr(one, part.name)
            if stage is None:
                continue
            log_rank0(f"iteration {i} of {len(iterations)}: {part.name}")
            made = stage()
            policy = made if part.name == "align" else policy
    log_rank0(f"scores of held-out answers by iteration: {scores(Path(output))}")
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
    for i, one in enumerate(asked.iterations, start=1):
        for part in fields(Iteration):
            if getattr(one, part.name, None) is not None:
                found[f"iteration-{i}-{part.name}"] = getattr(one, part.name)
    return found
