"""A Llama of a million parameters on sums: the demo, and what the tests train.

The preference recipes start from `sft_recipe`'s checkpoint, and train that first if `init_from` does not name another.
Both stages together take about a minute on two CPU cores.
"""

from typing import Any, Optional, Union

import nemo_run as run

from aligner.api import align
from aligner.demo import toy
from aligner.judge.self_rewarding import self_reward
from aligner.recipes import methods, pipelines, sums

NAME = "tiny_llama"


def model() -> run.Config:
    """4 layers, hidden size 128, 4 heads of which 2 for keys and values; a tokenizer of characters."""
    from nemo.collections import llm

    config = run.Config(
        llm.LlamaConfig,
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=64,
        make_vocab_size_divisible_by=32,
    )
    return run.Config(llm.LlamaModel, config=config, tokenizer=run.Config(toy.tokenizer))


@run.cli.factory(target=align, name="tiny_sft")
def sft_recipe(
    dir: str = "runs",
    name: str = "tiny_sft",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    train: Optional[str] = None,
    validation: Optional[str] = None,
    init_from: Optional[str] = None,
) -> run.Partial:
    """Teach the tiny model what answers look like: 200 steps on sums that are right every other time.

    From random weights, or from `init_from`, which adapters (`peft_scheme="lora"`) need.

    CLI: `nemo llm align --factory tiny_sft`
    """
    return methods.sft(
        _recipe(
            dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length,
            init_from=init_from,
            train=train or run.Partial(toy.arithmetic, dir=f"{dir}/data", split="demonstrations", rows=4096),
            validation=validation,
        )
    )  # fmt: skip


@run.cli.factory(target=align, name="tiny_dpo")
def dpo_recipe(
    dir: str = "runs",
    name: str = "tiny_dpo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    train: Optional[str] = None,
    validation: Optional[str] = None,
    init_from: Optional[str] = None,
) -> run.Partial:
    """Teach the tiny model to prefer right sums: DPO, 200 steps, held-out sums for validation.

    CLI: `nemo llm align --factory tiny_dpo loss.beta=0.05 trainer.max_steps=100`

    Python:
        recipe = recipes.tiny_llama.dpo_recipe(name="first")
        run.run(recipe)
    """
    return methods.dpo(
        _preference(
            dir,
            name,
            num_nodes,
            num_gpus_per_node,
            peft_scheme,
            packed_sequence,
            seq_length,
            train,
            validation,
            init_from,
        )
    )


@run.cli.factory(target=align, name="tiny_ipo")
def ipo_recipe(
    dir: str = "runs",
    name: str = "tiny_ipo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    train: Optional[str] = None,
    validation: Optional[str] = None,
    init_from: Optional[str] = None,
) -> run.Partial:
    """The same by IPO.

    CLI: `nemo llm align --factory tiny_ipo`
    """
    return methods.ipo(
        _preference(
            dir,
            name,
            num_nodes,
            num_gpus_per_node,
            peft_scheme,
            packed_sequence,
            seq_length,
            train,
            validation,
            init_from,
        )
    )


@run.cli.factory(target=align, name="tiny_rpo")
def rpo_recipe(
    dir: str = "runs",
    name: str = "tiny_rpo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    train: Optional[str] = None,
    validation: Optional[str] = None,
    init_from: Optional[str] = None,
) -> run.Partial:
    """The same by RPO: the further off an answer, the lower its reward.

    CLI: `nemo llm align --factory tiny_rpo`; `loss=rpo_sq` for another distance
    """
    return methods.rpo(
        _preference(
            dir,
            name,
            num_nodes,
            num_gpus_per_node,
            peft_scheme,
            packed_sequence,
            seq_length,
            train,
            validation,
            init_from,
        )
    )


@run.cli.factory(target=align, name="tiny_kto")
def kto_recipe(
    dir: str = "runs",
    name: str = "tiny_kto",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    train: Optional[str] = None,
    validation: Optional[str] = None,
    init_from: Optional[str] = None,
) -> run.Partial:
    """The same by KTO, each pair as two single answers.

    CLI: `nemo llm align --factory tiny_kto`
    """
    return methods.kto(
        _preference(
            dir,
            name,
            num_nodes,
            num_gpus_per_node,
            peft_scheme,
            packed_sequence,
            seq_length,
            train,
            validation,
            init_from,
        )
    )


@run.cli.factory(target=self_reward, name="tiny_self_rewarding")
def self_rewarding_recipe(
    dir: str = "runs",
    name: str = "tiny_self_rewarding",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    prompts: Optional[str] = None,
    init_from: Optional[str] = None,
    iterations: int = 3,
    num_generations: int = 8,
    beta: Union[float, list[float]] = 0.1,
    length_control: Union[float, list[float]] = 0.0,
) -> run.Partial:
    """Sums answered, checked and learned from, over and over; what is right is known, so one sees whether it works.

    It starts from a model that mostly forgets the carry. None of this size can judge: a calculator does
    (`aligner.judge.verifiers.exact_match`). `score.json` of an iteration is the share of held-out sums that come out right.

    CLI: `nemo llm self-reward --factory tiny_self_rewarding generate.num_generations=4 align.loss.beta=0.2`
    """
    return _pipeline(
        dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, prompts, init_from,
        iterations=iterations, num_generations=num_generations, beta=beta,
        select=pipelines.best_against_worst(length_control, iterations, max_score=1.0),
    )  # fmt: skip


@run.cli.factory(target=self_reward, name="tiny_spin")
def spin_recipe(
    dir: str = "runs",
    name: str = "tiny_spin",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    prompts: Optional[str] = None,
    init_from: Optional[str] = None,
    iterations: int = 3,
    beta: Union[float, list[float]] = 0.1,
) -> run.Partial:
    """Self-play: the given sums against the model's own.

    CLI: `nemo llm self-reward --factory tiny_spin`
    """
    return _pipeline(
        dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, prompts, init_from,
        iterations=iterations, num_generations=2, beta=beta, judged=False, select=pipelines.given_against_own,
    )  # fmt: skip


@run.cli.factory(target=self_reward, name="tiny_rejection_sampling")
def rejection_sampling_recipe(
    dir: str = "runs",
    name: str = "tiny_rejection_sampling",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 64,
    prompts: Optional[str] = None,
    init_from: Optional[str] = None,
    iterations: int = 1,
    num_generations: int = 8,
) -> run.Partial:
    """The best of eight answers to every sum, then supervised fine-tuning on them.

    CLI: `nemo llm self-reward --factory tiny_rejection_sampling`
    """
    return _pipeline(
        dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, prompts, init_from,
        iterations=iterations, num_generations=num_generations, select=pipelines.best_alone, method=methods.sft,
    )  # fmt: skip


def _pipeline(*arguments: Any, **settings: Any) -> run.Partial:
    return sums.pipeline(_recipe, *arguments, **settings)


def _preference(
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    train: str | None,
    validation: str | None,
    init_from: str | None,
) -> run.Partial:
    made = run.Partial(toy.arithmetic, dir=f"{dir}/data", split="validation", rows=256)
    return _recipe(
        dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length,
        init_from=init_from or sft_recipe(dir, f"{name}_sft", num_nodes, num_gpus_per_node, None, packed_sequence, seq_length),
        train=train or run.Partial(toy.arithmetic, dir=f"{dir}/data", split="train", rows=4096),
        validation=validation or (None if train else made),
    )  # fmt: skip


def _recipe(
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    *,
    init_from: str | run.Partial | None,
    train: str | run.Partial,
    validation: str | run.Partial | None,
) -> run.Partial:
    return methods.recipe(
        model=model(), init_from=init_from, train=train, validation=validation, dir=dir, name=name, num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node, peft_scheme=peft_scheme, packed_sequence=packed_sequence,
        seq_length=seq_length, micro_batch_size=32, global_batch_size=64, max_steps=200, max_epochs=-1,
        validate_every=50, save_every=50, lr=1e-3, min_lr=1e-4, warmup_steps=10,
    )  # fmt: skip
