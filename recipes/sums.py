"""The demo's pipeline: sums that a model answers, a calculator checks, and the model learns from."""

import functools
from collections.abc import Callable
from typing import Any

import nemo_run as run

from aligner.demo import toy
from aligner.judge import verifiers
from aligner.judge.judges import Verifier
from aligner.recipes import methods, pipelines


def pipeline(
    policy: Callable[..., run.Partial],
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    prompts: str | None,
    init_from: str | None,
    *,
    beta: float | list[float] | None = None,
    method: Callable[[run.Partial], run.Partial] = methods.dpo,
    **settings: Any,
) -> run.Partial:
    """Rounds of a model on sums, with a calculator as the judge; `policy` makes its recipes."""
    sizes = num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length
    return pipelines.pipeline(
        functools.partial(_round, policy, sizes, method),
        functools.partial(_engine, num_nodes, num_gpus_per_node),
        dir=dir,
        name=name,
        init_from=init_from or _careless(policy, f"{dir}/{name}", "start", sizes),
        prompts=prompts or run.Partial(toy.prompts, dir=f"{dir}/data", split="train"),
        held_out=run.Partial(toy.prompts, dir=f"{dir}/data", split="validation"),
        judge=run.Config(Verifier, function=run.Partial(verifiers.exact_match)),
        beta=beta,
        max_tokens=8,
        **settings,
    )


def _engine(num_nodes: int, num_gpus_per_node: int, checkpoint: str) -> run.Config:
    from aligner.generate.megatron_engine import MegatronEngine

    return run.Config(
        MegatronEngine, checkpoint=checkpoint, batch_size=64, devices=num_gpus_per_node, num_nodes=num_nodes
    )


def _careless(policy: Callable[..., run.Partial], dir: str, name: str, sizes: tuple[Any, ...]) -> run.Partial:
    """400 steps on sums in which the carry is mostly forgotten."""
    data = run.Partial(toy.arithmetic, dir=f"{dir}/data", split="careless", rows=4096)
    nodes, gpus, _, packed, length = sizes
    recipe = methods.sft(
        policy(dir, name, nodes, gpus, None, packed, length, init_from=None, train=data, validation=None)
    )
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = 400
    return recipe


def _round(
    policy: Callable[..., run.Partial],
    sizes: tuple[Any, ...],
    method: Callable[[run.Partial], run.Partial],
    *,
    dir: str,
    name: str,
    init_from: str,
    train: str,
) -> run.Partial:
    """A round's training: some hundred rows, several times, and held to its chosen answers."""
    recipe = method(policy(dir, name, *sizes, init_from=init_from, train=train, validation=None))
    recipe.sft_loss_weight = 1.0
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = 40
    recipe.optim.config.lr, recipe.optim.lr_scheduler.min_lr = 4e-4, 4e-5
    return recipe
