"""Shared parts of all self-rewarding recipes: iterations of generating, judging, selecting and aligning."""

from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run

from aligner.common.errors import ConfigError
from aligner.data.prompts import share
from aligner.generate.generation import generate_responses
from aligner.judge.build_pairs import best_responses, select_pairs, spin_pairs
from aligner.judge.judges import ModelJudge, judge_responses
from aligner.judge.meta_judge import meta_judge
from aligner.judge.selection import check_control
from aligner.judge.self_rewarding import Iteration, self_reward
from aligner.recipes.variants import Variant

SEED = 1234
"""Random seed of the first iteration's responses; each further iteration adds 1."""


def per_iteration(name: str, value: Any, iterations: int) -> list[Any]:
    """Return a list with a value for each iteration, from a list of this length or one value for all.

    Raises:
        ConfigError: the list has another length.
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
    judge: Callable[[run.Config], run.Config],
    judged: bool = True,
    meta: Optional[Callable[[int], Optional[dict[str, Any]]]] = None,
    held_out: Any = None,
    beta: float | list[float] | None = None,
    **generate: Any,
) -> run.Partial:
    """Return a self-rewarding pipeline with stages from `policy`, `engine`, `judge` and `select`.

    Args:
        policy: takes dir, name, init_from and train; returns the training recipe of an iteration.
        engine: takes a checkpoint; returns its generation backend.
        dir, name: folder of the pipeline.
        init_from: initial policy; a recipe is run first.
        prompts: prompts of all iterations, or a list with one file per iteration.
        iterations: number of iterations.
        select: takes the iteration's number, files and prompts; returns the stage that writes training rows.
        judge: takes the engine of the policy at the start of an iteration; returns the judge, which may be another.
        judged: whether the responses that are trained on are judged.
        meta: takes the iteration's number; returns arguments of `meta_judge` if the policy is also trained to judge.
        held_out: prompts for the evaluation of each policy at the end of its iteration, by the judge of the first
            iteration, so that scores can be compared.
        beta: beta of the loss, or a list with a value per iteration; None: the recipe's own.
        generate: further arguments of `generate_responses`.

    Raises:
        ConfigError: iterations is below 1, or a list has another length.
    """
    _check_iterations(iterations)
    prompts_list, betas = per_iteration("prompts", prompts, iterations), per_iteration("beta", beta, iterations)
    first = init_from if isinstance(init_from, run.Partial) else None
    start = checkpoint = f"{first.log.log_dir}/{first.log.name}" if first is not None else str(init_from)
    stages = []
    for i in range(1, iterations + 1):
        folder = f"{dir}/{name}/iteration-{i}"
        files = {part: f"{folder}/{part}.jsonl" for part in ("candidates", "judgments", "judge_pairs", "train")}
        inputs = {"prompts": prompts_list[i - 1], "candidates": files["candidates"]}
        iteration = run.Config(
            Iteration,
            generate=run.Partial(
                generate_responses,
                prompts=inputs["prompts"],
                output=files["candidates"],
                engine=engine(checkpoint),
                seed=SEED + i - 1,
                **generate,
            ),
            select=select(i, files, inputs["prompts"]),
            align=policy(dir=folder, name="policy", init_from=checkpoint, train=files["train"]),
        )
        if betas[i - 1] is not None:
            iteration.align.loss.beta = betas[i - 1]
        if judged:
            own = judge(engine(checkpoint))
            iteration.judge = run.Partial(judge_responses, **inputs, output=files["judgments"], judge=own)
        if meta is not None and (settings := meta(i)) is not None:
            compared = {"judgments": files["judgments"], "output": files["judge_pairs"], "engine": engine(checkpoint)}
            own = judge(engine(checkpoint))
            iteration.meta_judge = run.Partial(meta_judge, **inputs, **compared, judge=own, **settings)
        checkpoint = f"{folder}/policy"
        if held_out is not None:
            score = f"{folder}/score.json"
            iteration.evaluate = _evaluate(held_out, score, engine(checkpoint), judge(engine(start)), generate)
        stages.append(iteration)
    return run.Partial(self_reward, output=f"{dir}/{name}", iterations=stages, start=first)


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ConfigError(f"iterations: must be at least 1, found {iterations}")


def judging_pipeline(
    policy: Callable[..., run.Partial],
    engine: Callable[[str], run.Config],
    variant: Variant,
    *,
    meta: bool,
    dir: str,
    name: str,
    prompts: Any,
    length_control: float | list[float],
    **settings: Any,
) -> run.Partial:
    """Return the pipeline of a policy that judges itself.

    Args:
        policy, engine, dir, name, prompts, settings: see `pipeline`. A single source of prompts is divided
            among the iterations if the variant wants new ones in each.
        variant: numbers of iterations, responses and judgments, temperatures, limits on judge pairs.
        meta: whether the policy is also trained to judge.
        length_control: ρ, or a list with a value per iteration.

    Raises:
        ConfigError: iterations is below 1, or a list has another length.
    """
    iterations = variant.iterations
    _check_iterations(iterations)
    sampling: dict[str, Any] = {"temperature": variant.temperature, "top_p": variant.top_p}
    if variant.new_prompts and iterations > 1 and not isinstance(prompts, list | tuple):
        prompts = [
            run.Partial(
                share, source=prompts, number=i, of=iterations, output=f"{dir}/{name}/iteration-{i}/prompts.jsonl"
            )
            for i in range(1, iterations + 1)
        ]

    def compares(i: int) -> dict[str, Any] | None:
        if not meta or i > (variant.judge_pair_iterations or iterations):
            return None
        return {"max_same_score_fraction": variant.max_same_score_fraction, **sampling}

    return pipeline(
        policy,
        engine,
        dir=dir,
        name=name,
        prompts=prompts,
        iterations=iterations,
        select=best_against_worst(
            length_control,
            iterations,
            with_judge_pairs=lambda i: compares(i) is not None,
            max_judge_pair_fraction=variant.max_judge_pair_fraction,
        ),
        judge=lambda own: run.Config(ModelJudge, engine=own, num_judgments=variant.num_judgments, **sampling),
        meta=compares,
        num_generations=variant.num_generations,
        **sampling,
        **settings,
    )


def _evaluate(
    held_out: Any, output: str, engine: run.Config, judge: run.Config, generate: dict[str, Any]
) -> run.Partial:
    from aligner.judge.judge_policy import evaluate

    limit = {name: value for name, value in generate.items() if name == "max_tokens"}
    return run.Partial(evaluate, prompts=held_out, output=output, engine=engine, judge=judge, **limit)


def engine(
    apply_chat_template: bool, num_nodes: int, num_gpus_per_node: int, tensor_model_parallel_size: int, checkpoint: str
) -> run.Config:
    """Return a Megatron engine on the training ranks; each tensor-parallel group has a copy of the policy."""
    from aligner.generate.megatron_engine import MegatronEngine

    return run.Config(
        MegatronEngine,
        checkpoint=checkpoint,
        apply_chat_template=apply_chat_template,
        batch_size=16,
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        tensor_model_parallel_size=tensor_model_parallel_size,
    )


# ---- training rows of an iteration ---------------------------------------------------------------------------------


def best_against_worst(
    length_control: float | list[float],
    iterations: int,
    *,
    with_judge_pairs: Callable[[int], bool] = lambda _: False,
    **settings: Any,
) -> Callable[[int, dict[str, str], Any], run.Partial]:
    """Return the `select` of `pipeline` for self-rewarding pairs, with ρ = `length_control` per iteration.

    Raises:
        ConfigError: a list has another length, or ρ is outside [0, 0.5).
    """
    controls = per_iteration("length_control", length_control, iterations)
    for control in controls:
        check_control(control)

    def stage(i: int, files: dict[str, str], prompts: Any) -> run.Partial:
        return run.Partial(
            select_pairs,
            prompts=prompts,
            candidates=files["candidates"],
            judgments=files["judgments"],
            output=files["train"],
            length_control=controls[i - 1],
            judge_pairs=files["judge_pairs"] if with_judge_pairs(i) else None,
            **settings,
        )

    return stage


def given_against_own(_: int, named: dict[str, str], prompts: Any) -> run.Partial:
    """Return the stage of SPIN pairs: the reference response against the model's own."""
    return run.Partial(spin_pairs, prompts=prompts, candidates=named["candidates"], output=named["train"])


def best_alone(_: int, named: dict[str, str], prompts: Any) -> run.Partial:
    """Return the stage of best-of-n demonstrations."""
    return run.Partial(
        best_responses,
        prompts=prompts,
        candidates=named["candidates"],
        judgments=named["judgments"],
        output=named["train"],
    )
