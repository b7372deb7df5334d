"""Self-rewarding: iterations of generating, judging, selecting and aligning; each stage reads and writes files.

    NAME/start/                         the supervised stage before the first iteration, if any
    NAME/iteration-1/candidates.jsonl   responses (aligner.generate.generation)
    NAME/iteration-1/judgments.jsonl    scores (aligner.judge.judges)
    NAME/iteration-1/judge_pairs.jsonl  pairs of judgments, with a meta-judge (aligner.judge.meta_judge)
    NAME/iteration-1/train.jsonl        pairs, and a report (aligner.judge.build_pairs)
    NAME/iteration-1/policy/            an `align` run; the previous policy is its initial policy and its reference
    NAME/iteration-1/score.json         evaluation on held-out prompts (aligner.judge.judge_policy)

A complete file is not written again, so a user's own file can replace any of these files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from aligner.common.console import log_rank0
from aligner.common.errors import AlignError

if TYPE_CHECKING:
    import nemo_run as run

Stage = Callable[[], Path]


@dataclass(kw_only=True)
class Iteration:
    """The stages of an iteration, in order; None skips a stage."""

    generate: Stage
    judge: Optional[Stage] = None
    meta_judge: Optional[Stage] = None
    select: Stage
    align: Stage
    evaluate: Optional[Stage] = None


def self_reward(output: str, iterations: list[Iteration], start: Optional[Stage] = None) -> Path:
    """Run all stages of all iterations in this job. If the pipeline is incomplete, it resumes.

    Args:
        output: folder of the pipeline, with the files of all stages.
        iterations: stages of each iteration.
        start: run before the first iteration.

    Returns:
        The folder of the last policy.

    Raises:
        SanityCheckError: an iteration gives too few pairs.
        SystemExit: code 75 after preemption: the job has saved a checkpoint and must be run again.
    """
    from aligner.common.console import install_excepthook

    install_excepthook()
    _check_prompts(iterations)
    if start is not None:
        start()
    policy = Path(output)
    for i, iteration in enumerate(iterations, start=1):
        for part in fields(Iteration):
            stage: Stage | None = getattr(iteration, part.name)
            if stage is None:
                continue
            log_rank0(f"iteration {i} of {len(iterations)}: {part.name}")
            result = stage()
            policy = result if part.name == "align" else policy
    log_rank0(f"scores on held-out prompts by iteration: {scores(Path(output))}")
    return policy


def _check_prompts(iterations: list[Iteration]) -> None:
    """Read all prompts before the first stage, which may take hours."""
    from aligner.data.prompts import read_prompts

    for i, iteration in enumerate(iterations, start=1):
        for stage in (iteration.generate, iteration.evaluate):
            prompts = getattr(stage, "keywords", {}).get("prompts")
            if prompts is not None:
                try:
                    read_prompts(prompts)
                except AlignError as error:
                    raise type(error)(f"iteration {i}: {error}") from None


def scores(folder: Path) -> list[float]:
    """Return the scores of a pipeline's evaluated policies, in order."""
    files = sorted(folder.glob("iteration-*/score.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return [json.loads(path.read_text())["score"] for path in files]


def stages(recipe: "run.Partial") -> dict[str, "run.Partial"]:
    """Return the stages of a `self_reward` recipe by name, to launch as jobs that depend on each other.

    executors.launch(pipeline.stages(recipe), executors.slurm(...), name="self_rewarding")
    """
    named_stages: dict[str, Any] = {}
    pipeline: Any = recipe
    if getattr(pipeline, "start", None) is not None:
        named_stages["start"] = pipeline.start
    for i, iteration in enumerate(pipeline.iterations, start=1):
        for part in fields(Iteration):
            if getattr(iteration, part.name, None) is not None:
                named_stages[f"iteration-{i}-{part.name}"] = getattr(iteration, part.name)
    return named_stages
