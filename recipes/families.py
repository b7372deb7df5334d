"""The recipes of a model whose file says what is its own: NeMo's config, where its weights are, how it is divided.

All such models have the same functions with the same arguments; they are made here once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Protocol, Union

import nemo_run as run

from aligner.api import align
from aligner.judge.self_rewarding import self_reward
from aligner.recipes import methods, pipelines


class Layout(NamedTuple):
    """How a model is divided over GPUs of 80 GB; what is left of them is data parallel."""

    nodes: int = 1
    """At least."""
    gpus: int = 8
    """Of each node."""
    tensor: int = 1
    """Sequence parallel, too, where it is more than 1."""
    pipeline: int = 1
    virtual: Optional[int] = None
    """Stages of each pipeline rank, which take turns."""
    expert: int = 1
    answering: Optional[int] = None
    """Tensor parallelism of the engine that answers, which knows no other; None: `tensor`."""
    recompute: bool = False
    """Make each layer's activations again in the backward pass, where they would not fit."""

    def apply(self, recipe: Any) -> None:
        """Divide a run's model so."""
        strategy = recipe.trainer.strategy
        strategy.tensor_model_parallel_size, strategy.sequence_parallel = self.tensor, self.tensor > 1
        strategy.pipeline_model_parallel_size = self.pipeline
        strategy.virtual_pipeline_model_parallel_size = self.virtual
        strategy.expert_model_parallel_size = self.expert
        if self.expert > 1:
            strategy.expert_tensor_parallel_size = 1
        if self.recompute:
            config = recipe.model.config
            config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1

    def __str__(self) -> str:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "virtual": self.virtual or 1, "expert": self.expert}
        told = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "data parallel alone"
        told += ", activations recomputed" * self.recompute
        return f"{self.nodes} node{'s' * (self.nodes > 1)} of {self.gpus} GPU{'s' * (self.gpus > 1)} with 80 GB: {told}"


class Align(Protocol):
    """A recipe of `align`."""

    def __call__(
        self,
        dir: str = "runs",
        name: str = ...,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = ...,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        seq_length: int = ...,
        train: str = "train.jsonl",
        validation: Optional[str] = None,
        init_from: str = ...,
    ) -> run.Partial: ...


class Pipeline(Protocol):
    """A recipe of `self_reward`."""

    def __call__(
        self,
        dir: str = "runs",
        name: str = ...,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = ...,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        seq_length: int = ...,
        prompts: Union[str, list[str]] = "prompts.jsonl",
        init_from: str = ...,
        iterations: int = ...,
        num_generations: int = ...,
        num_judgments: int = ...,
        beta: Union[float, list[float]] = 0.1,
        length_control: Union[float, list[float]] = 0.0,
    ) -> run.Partial: ...


Aligns = tuple[Align, Align, Align, Align, Align]
ALIGN = ("sft", "dpo", "ipo", "rpo", "kto")


SAID = {
    "sft": "Supervised fine-tuning of {title}, one epoch in steps of 128 responses.",
    "dpo": "DPO of {title}, one epoch in steps of 256 pairs.",
    "ipo": "IPO of {title}, one epoch in steps of 256 pairs.",
    "rpo": "RPO of {title}, from rows with rewards, one epoch in steps of 256 pairs.",
    "kto": "KTO of {title}, from pairs or single responses, one epoch in steps of 256.",
    "self_rewarding": "{title} answers, judges its answers and learns from them (arXiv 2401.10020), three rounds.",
    "meta_rewarding": "The same, and it learns to judge, too (arXiv 2407.19594): four rounds, seven answers, eleven "
    "judgments of each.",
}


class _Model(NamedTuple):
    """What a file says of its model."""

    name: str
    title: str
    model: Callable[[], run.Config]
    source: str
    layout: Layout
    adapters: Layout
    seq_length: int
    apply_chat_template: bool


MODELS: dict[str, _Model] = {}
"""All that were described so far, by name."""


def recipes(
    name: str,
    title: str,
    model: Callable[[], run.Config],
    *,
    source: str,
    layout: Layout,
    adapters: Layout,
    seq_length: int = 4096,
    apply_chat_template: bool = True,
) -> tuple[Align, Align, Align, Align, Align, Pipeline, Pipeline]:
    """The functions of a model's file, registered for the command line as `<name>_<method>`.

    First those of `align`, in the order of `ALIGN`, then self-rewarding and meta-rewarding.

    Args:
        name: as NeMo names the model.
        title: for people.
        model: NeMo's model and config.
        source: where its weights are: `hf://name`.
        layout: of all weights.
        adapters: of LoRA and DoRA.
        seq_length: tokens of a row, at most.
        apply_chat_template: whether a string is read as a user's message and an assistant's.
    """
    aligns = align_recipes(
        name,
        title,
        model,
        source=source,
        layout=layout,
        adapters=adapters,
        seq_length=seq_length,
        apply_chat_template=apply_chat_template,
    )
    about = MODELS[name]
    return (
        *aligns,
        _pipeline(about, "self_rewarding", iterations=3, num_generations=4, num_judgments=3),
        _pipeline(about, "meta_rewarding", iterations=4, num_generations=7, num_judgments=11),
    )


def align_recipes(
    name: str,
    title: str,
    model: Callable[[], run.Config],
    *,
    source: str,
    layout: Layout,
    adapters: Layout,
    seq_length: int = 4096,
    apply_chat_template: bool = True,
) -> Aligns:
    """The same of a model that Megatron cannot answer with: too large without pipelines, or with attention of its own.

    Its rounds can be put together of `generate_responses` with `engine=server` and the stages that follow it.
    """
    about = MODELS[name] = _Model(name, title, model, source, layout, adapters, seq_length, apply_chat_template)
    sft, dpo, ipo, rpo, kto = (_align(about, method) for method in ALIGN)
    return sft, dpo, ipo, rpo, kto


def _align(about: _Model, method: str) -> Align:
    default = f"{about.name}_{method}"

    def recipe(
        dir: str = "runs",
        name: str = default,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = about.layout.gpus,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        seq_length: int = about.seq_length,
        train: str = "train.jsonl",
        validation: Optional[str] = None,
        init_from: str = about.source,
    ) -> run.Partial:
        sizes = {"global_batch_size": 128, "lr": 5e-6} if method == "sft" else {}
        made = _recipe(
            about, dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, validation,
            init_from, **sizes,
        )  # fmt: skip
        return getattr(methods, method)(made)

    example = f"nemo llm align --factory {default} -y data.train=train.jsonl"
    return _registered(about, method, recipe, align, example)


def _pipeline(about: _Model, method: str, *, iterations: int, num_generations: int, num_judgments: int) -> Pipeline:
    default = f"{about.name}_{method}"
    iterations_, num_generations_, num_judgments_ = iterations, num_generations, num_judgments

    def recipe(
        dir: str = "runs",
        name: str = default,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = about.layout.gpus,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        # A judgment's prompt holds the question, the answer and the rules.
        seq_length: int = max(2048, about.seq_length),
        prompts: Union[str, list[str]] = "prompts.jsonl",
        init_from: str = about.source,
        iterations: int = iterations_,
        num_generations: int = num_generations_,
        num_judgments: int = num_judgments_,
        beta: Union[float, list[float]] = 0.1,
        length_control: Union[float, list[float]] = 0.0,
    ) -> run.Partial:
        def policy(*, dir: str, name: str, init_from: str, train: str) -> run.Partial:
            made = _recipe(
                about, dir, name, num_nodes, num_gpus_per_node, peft_scheme, packed_sequence, seq_length, train, None,
                init_from, global_batch_size=64,
            )  # fmt: skip
            return methods.dpo(made)

        layout = about.layout if peft_scheme is None else about.adapters
        meta = method == "meta_rewarding"
        return pipelines.pipeline(
            policy,
            functools.partial(
                pipelines.engine,
                about.apply_chat_template,
                num_nodes or layout.nodes,
                num_gpus_per_node,
                layout.answering or layout.tensor,
            ),
            dir=dir,
            name=name,
            init_from=init_from,
            prompts=prompts,
            iterations=iterations,
            select=pipelines.best_against_worst(length_control, iterations, meta=meta),
            num_judgments=num_judgments,
            meta=meta,
            beta=beta,
            num_generations=num_generations,
            temperature=0.7,
            top_p=0.9,
        )

    example = f"nemo llm self-reward --factory {default} -y generate.num_generations=8"
    return _registered(about, method, recipe, self_reward, example)


def _registered(about: _Model, method: str, recipe: Any, target: Any, example: str) -> Any:
    recipe.__name__ = recipe.__qualname__ = f"{method}_recipe"
    recipe.__module__ = f"{__package__}.{about.name}"
    recipe.__doc__ = (
        f"{SAID[method].format(title=about.title)}\n\n    {about.layout};\n    adapters (peft_scheme='lora'): "
        f"{about.adapters}.\n\n    CLI: `{example}`\n    "
    )
    return run.cli.factory(recipe, target=target, name=f"{about.name}_{method}")


def _recipe(
    about: _Model,
    dir: str,
    name: str,
    num_nodes: int | None,
    num_gpus_per_node: int,
    peft_scheme: str | None,
    packed_sequence: bool,
    seq_length: int,
    train: str,
    validation: str | None,
    init_from: str,
    *,
    lr: float = 9e-7,
    global_batch_size: int = 256,
) -> run.Partial:
    layout = about.layout if peft_scheme is None else about.adapters
    # Adapters want about ten times the learning rate of a full run (docs/hyperparameters.md).
    lr = lr if peft_scheme is None else 10 * lr
    made = methods.recipe(
        model=about.model(), init_from=init_from, train=train, validation=validation, dir=dir, name=name,
        num_nodes=num_nodes or layout.nodes, num_gpus_per_node=num_gpus_per_node, peft_scheme=peft_scheme,
        packed_sequence=packed_sequence, seq_length=seq_length, lr=lr, min_lr=lr, global_batch_size=global_batch_size,
        apply_chat_template=about.apply_chat_template,
    )  # fmt: skip
    layout.apply(made)
    return made


def nemo(model: str, config: str, **settings: Any) -> run.Config:
    """A model of NeMo's by the names of its classes; the tokenizer comes from the checkpoint."""
    from nemo.collections import llm

    # A GPU's fused kernel rounds its gradient to bfloat16; log-probabilities stay in float32.
    settings = {"cross_entropy_loss_fusion": False} | settings
    return run.Config(getattr(llm, model), config=run.Config(getattr(llm, config), **settings))
