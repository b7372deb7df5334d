"""The demo's pipeline: a model answers sums, a calculator judges them, and the model learns from its best answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import nemo_run as run

from aligner.demo import toy
from aligner.judge import verifiers
from aligner.judge.judges import Verifier
from aligner.recipes import methods, pipelines
from aligner.recipes.signatures import AlignArguments

Build = Callable[[AlignArguments], run.Partial]


def pipeline(
    build: Build,
    arguments: AlignArguments,
    prompts: str | None,
    *,
    beta: float | list[float] | None = None,
    method: Callable[[run.Partial], run.Partial] = methods.dpo,
    **settings: Any,
) -> run.Partial:
    """Iterations of a model on sums.

    Args:
        build: makes the recipe of a training stage.
        arguments: of the pipeline; the stages share its sizes.
        prompts: file of sums; None: those of the demo.
        beta: see `pipelines.pipeline`.
        method: what each iteration trains with.
        settings: further arguments of `pipelines.pipeline`.
    """
    data = f"{arguments.dir}/data"
    return pipelines.pipeline(
        lambda **stage: _iteration(method(build(dataclasses.replace(arguments, **stage)))),
        lambda checkpoint: _engine(arguments, checkpoint),
        dir=arguments.dir,
        name=arguments.name,
        init_from=arguments.init_from or _careless(build, arguments),
        prompts=prompts or run.Partial(toy.prompts, dir=data, split="train"),
        held_out=run.Partial(toy.prompts, dir=data, split="validation"),
        judge=_calculator,
        beta=beta,
        max_tokens=8,
        **settings,
    )


def _calculator(_: run.Config) -> run.Config:
    return run.Config(Verifier, function=run.Partial(verifiers.exact_match))


def _engine(arguments: AlignArguments, checkpoint: str) -> run.Config:
    from aligner.generate.megatron_engine import MegatronEngine

    return run.Config(
        MegatronEngine,
        checkpoint=checkpoint,
        batch_size=64,
        devices=arguments.num_gpus_per_node,
        num_nodes=arguments.num_nodes or 1,
    )


def _careless(build: Build, arguments: AlignArguments) -> run.Partial:
    """400 steps of SFT on sums in which the carry is mostly forgotten."""
    folder = f"{arguments.dir}/{arguments.name}"
    train = run.Partial(toy.arithmetic, dir=f"{folder}/data", split="careless", rows=4096)
    recipe = methods.sft(
        build(dataclasses.replace(arguments, dir=folder, name="start", peft_scheme=None, train=train, init_from=None))
    )
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = 400
    return recipe


def _iteration(recipe: run.Partial) -> run.Partial:
    """Several epochs over some hundred rows, with an SFT term on the chosen responses."""
    recipe.sft_loss_weight = 1.0
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = 40
    recipe.optim.config.lr, recipe.optim.lr_scheduler.min_lr = 4e-4, 4e-5
    return recipe
