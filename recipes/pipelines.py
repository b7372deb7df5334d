"""What the iterated recipes of all models share: rounds of generating, judging, selecting and aligning."""

import copy
from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run

from aligner.common.errors import ConfigError
from aligner.generate.generation import generate_responses
from aligner.judge.build_pairs import best_responses, select_pairs, spin_pairs
from aligner.judge.judges import ModelJudge, judge_responses
from aligner.judge.meta_judge import meta_judge
from aligner.judge.selection import check_control
from aligner.judge.self_rewarding import Iteration, self_reward

SEED = 1234
"""Of the first round's answers; each further one has the next."""


def per_iteration(name: str, value: Any, iterations: int) -> list[Any]:
    """A value for each iteration: the same for all, or a list of as many.

    Raises:
        ConfigError: the list is of another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * iterations
    if len(value) != iterations:
        raise ConfigError(
            f"{name}: has {len(value)} values for {iterations} iterations; give one for each, or one for all"
        )
    return list(value)


def pipeline(
    policy: Callable[..., run.Partial],
    engine: Callable[[str], run.Config],
    *,
    dir: str,
    name: str,
    init_from: str | run.Partial,
    prompts: Any,
    iterations: int,
    select: Callable[[int, dict[str, str], Any], run.Partial],
    judge: Optional[run.Config] = None,
    judged: bool = True,
    num_judgments: int = 3,
    meta: bool = False,
    held_out: Any = None,
    beta: float | list[float] | None = None,
    **generate: Any,
) -> run.Partial:
    """A pipeline; `policy`, `engine` and `select` say what its stages are.

    Args:
        policy: the recipe of a round's training, given dir, name, init_from and train.
        engine: who answers, given a checkpoint.
        dir, name: the pipeline's folder.
        init_from: what the first round starts from; a recipe is run first.
        prompts: of all rounds, or a list with one file for each.
        iterations: rounds.
        select: the stage that makes rows, given the number of the round, its files and its prompts.
        judge: who scores answers; None: the policy of the round.
        judged: whether answers are scored at all.
        num_judgments: of each answer by the policy.
        meta: whether the policy learns to judge, too.
        held_out: prompts that each policy answers greedily at the end of its round.
        beta: of the loss, or a list with one for each iteration; None: the recipe's own.
        generate: further arguments of `generate_responses`.

    Raises:
        ConfigError: iterations is below 1, or a list has another length.
    """
    if iterations < 1:
        raise ConfigError(f"iterations: must be at least 1, found {iterations}")
    asked, betas = per_iteration("prompts", prompts, iterations), per_iteration("beta", beta, iterations)
    first = init_from if isinstance(init_from, run.Partial) else None
    at = f"{first.log.log_dir}/{first.log.name}" if first is not None else str(init_from)
    made = []
    for i in range(1, iterations + 1):
        here = f"{dir}/{name}/iteration-{i}"
        named = {part: f"{here}/{part}.jsonl" for part in ("candidates", "judgments", "judge_pairs", "train")}
        question, scoring = (
            asked[i - 1],
            judge or run.Config(ModelJudge, engine=engine(at), num_judgments=num_judgments),
        )
        one = run.Config(
            Iteration,
            generate=run.Partial(
                generate_responses,
                prompts=question,
                output=named["candidates"],
                engine=engine(at),
                seed=SEED + i - 1,
                **generate,
            ),
            select=select(i, named, question),
            align=policy(dir=here, name="policy", init_from=at, train=named["train"]),
        )
        if betas[i - 1] is not None:
            one.align.loss.beta = betas[i - 1]
        if judged:
            one.judge = _judge(named, question, scoring)
        if meta:
            one.meta_judge = _meta(named, question, scoring, engine(at))
        at = f"{here}/policy"
        if held_out is not None:
            one.evaluate = _evaluate(held_out, f"{here}/score.json", engine(at), copy.deepcopy(scoring), generate)
        made.append(one)
    return run.Partial(self_reward, output=f"{dir}/{name}", iterations=made, start=first)


def _judge(named: dict[str, str], prompts: Any, judge: run.Config) -> run.Partial:
    return run.Partial(
        judge_responses,
        prompts=prompts,
        candidates=named["candidates"],
        output=named["judgments"],
        judge=copy.deepcopy(judge),
    )


def _meta(named: dict[str, str], prompts: Any, judge: run.Config, engine: run.Config) -> run.Partial:
    return run.Partial(
        meta_judge,
        prompts=prompts,
        candidates=named["candidates"],
        judgments=named["judgments"],
        output=named["judge_pairs"],
        engine=engine,
        judge=copy.deepcopy(judge),
    )


def _evaluate(
    held_out: Any, output: str, engine: run.Config, judge: run.Config, generate: dict[str, Any]
) -> run.Partial:
    from aligner.judge.judge_policy import evaluate

    more = {name: value for name, value in generate.items() if name == "max_tokens"}
    return run.Partial(evaluate, prompts=held_out, output=output, engine=engine, judge=judge, **more)


def engine(
    apply_chat_template: bool, num_nodes: int, num_gpus_per_node: int, tensor_model_parallel_size: int, checkpoint: str
) -> run.Config:
    """Megatron on the ranks that train; each tensor-parallel group is one copy of the policy."""
    from aligner.generate.megatron_engine import MegatronEngine

    return run.Config(
        MegatronEngine, checkpoint=checkpoint, apply_chat_template=apply_chat_template, batch_size=16, devices=num_gpus_per_node, num_nodes=num_nodes,
        tensor_model_parallel_size=tensor_model_parallel_size,
    )  # fmt: skip


# ---- what a round learns from --------------------------------------------------------------------------------------


def best_against_worst(
    length_control: float | list[float], iterations: int, *, meta: bool = False, **settings: Any
) -> Callable[[int, dict[str, str], Any], run.Partial]:
    """Pairs of self-rewarding; ρ for each iteration.

    Raises:
        ConfigError: a list has another length.
    """
    controls = per_iteration("length_control", length_control, iterations)
    for control in controls:
        check_control(control)

    def made(i: int, named: dict[str, str], prompts: Any) -> run.Partial:
        return run.Partial(
            select_pairs,
            prompts=prompts,
            candidates=named["candidates"],
            judgments=named["judgments"],
            output=named["train"],
            length_control=controls[i - 1],
            judge_pairs=named["judge_pairs"] if meta else None,
            **settings,
        )

    return made


def given_against_own(_: int, named: dict[str, str], prompts: Any) -> run.Partial:
    """Pairs of self-play: the given answer against the model's."""
    return run.Partial(spin_pairs, prompts=prompts, candidates=named["candidates"], output=named["train"])


def best_alone(_: int, named: dict[str, str], prompts: Any) -> run.Partial:
    """Demonstrations: the best of several answers."""
    return run.Partial(
        best_responses,
        prompts=prompts,
        candidates=named["candidates"],
        judgments=named["judgments"],
        output=named["train"],
    )
