"""A Llama of a million parameters on sums: the demo, and the model of the tests.

The preference recipes start from the checkpoint of `sft_recipe`, and train that first if `init_from` names no other.
Both stages together take about a minute on two CPU cores.
"""

import dataclasses
from typing import Optional, Union

import nemo_run as run

from aligner.api import align
from aligner.demo import toy
from aligner.judge.self_rewarding import self_reward
from aligner.recipes import methods, pipelines, signatures, sums
from aligner.recipes.signatures import AlignArguments, AlignRecipe

NAME = "tiny_llama"


def model() -> run.Config:
    """4 layers, hidden size 128, 4 attention heads, 2 query groups, a tokenizer of characters."""
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


DESCRIPTIONS = {
    "sft": "Teach the tiny model what answers look like: 200 steps on sums that are right every other time.\n\n"
    '    Training starts from random weights, or from `init_from`, which adapters (`peft_scheme="lora"`) need.',
    "dpo": "Teach the tiny model to prefer right sums: DPO, 200 steps, held-out sums for validation.",
    "ipo": "Teach the tiny model to prefer right sums by IPO.",
    "rpo": "Teach the tiny model to prefer right sums by RPO: the further off an answer, the lower its reward.",
    "kto": "Teach the tiny model to prefer right sums by KTO, each pair as two single responses.",
}


def _recipe(arguments: AlignArguments) -> run.Partial:
    return methods.recipe(
        arguments, model=model(), micro_batch_size=32, global_batch_size=64, max_steps=200, max_epochs=-1,
        validate_every=50, save_every=50, lr=1e-3, min_lr=1e-4,
    )  # fmt: skip


def _sft(arguments: AlignArguments) -> run.Partial:
    demonstrations = run.Partial(toy.arithmetic, dir=f"{arguments.dir}/data", split="demonstrations", rows=4096)
    return methods.sft(_recipe(dataclasses.replace(arguments, train=arguments.train or demonstrations)))


def _preferences(arguments: AlignArguments) -> run.Partial:
    train, validation, init_from = arguments.train, arguments.validation, arguments.init_from
    if train is None:
        sums_of = f"{arguments.dir}/data"
        train = run.Partial(toy.arithmetic, dir=sums_of, split="train", rows=4096)
        validation = validation or run.Partial(toy.arithmetic, dir=sums_of, split="validation", rows=256)
    if init_from is None:
        init_from = _sft(
            dataclasses.replace(arguments, name=f"{arguments.name}_sft", peft_scheme=None, train=None, validation=None)
        )
    return _recipe(dataclasses.replace(arguments, train=train, validation=validation, init_from=init_from))


def _align(method: str) -> AlignRecipe:
    def build(arguments: AlignArguments) -> run.Partial:
        return _sft(arguments) if method == "sft" else getattr(methods, method)(_preferences(arguments))

    recipe = signatures.align_recipe(build, default_name=f"tiny_{method}", default_seq_length=64)
    doc = f"{DESCRIPTIONS[method]}\n\n    CLI: `nemo llm align --factory tiny_{method} trainer.max_steps=100`\n    "
    signatures.register(recipe, target=align, module=__name__, method=method, model="tiny", doc=doc)
    return recipe


sft_recipe, dpo_recipe, ipo_recipe, rpo_recipe, kto_recipe = map(_align, DESCRIPTIONS)


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
    """Self-rewarding on sums, whose right results are known.

    The first policy mostly forgets the carry. A model of this size cannot judge, so a calculator does
    (`aligner.judge.verifiers.exact_match`). `score.json` of an iteration is the fraction of right held-out sums.

    CLI: `nemo llm self-reward --factory tiny_self_rewarding generate.num_generations=4 align.loss.beta=0.2`
    """
    return sums.pipeline(
        _recipe,
        _sizes(dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, init_from),
        prompts,
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
    """SPIN on sums: the given result is chosen, the model's own is rejected.

    CLI: `nemo llm self-reward --factory tiny_spin`
    """
    return sums.pipeline(
        _recipe,
        _sizes(dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, init_from),
        prompts,
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
    """Rejection sampling on sums: supervised fine-tuning on the best of eight responses to each.

    CLI: `nemo llm self-reward --factory tiny_rejection_sampling`
    """
    return sums.pipeline(
        _recipe,
        _sizes(dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, init_from),
        prompts,
        iterations=iterations, num_generations=num_generations, select=pipelines.best_alone, method=methods.sft,
    )  # fmt: skip


def _sizes(
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    init_from: str | None,
) -> AlignArguments:
    return AlignArguments(
        dir=dir, name=name, num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, peft_scheme=peft_scheme,
        packed_sequence=packed_sequence, seq_length=seq_length, train=None, validation=None, init_from=init_from,
    )  # fmt: skip
