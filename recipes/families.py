"""Recipes of a model from its description: NeMo's config, the source of its weights, its parallel sizes.

All such models have the same functions with the same arguments, which are made here once.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import nemo_run as run

from aligner.api import align
from aligner.judge.self_rewarding import self_reward
from aligner.recipes import methods, pipelines, signatures
from aligner.recipes.signatures import AlignArguments, AlignRecipe, PipelineRecipe
from aligner.recipes.variants import PAPER, variant_of


class Layout(NamedTuple):
    """Parallel sizes of a model on GPUs of 80 GB; the remaining GPUs are data parallel."""

    nodes: int = 1
    """Minimum number of nodes."""
    gpus: int = 8
    """GPUs of each node."""
    tensor: int = 1
    """With sequence parallelism if it is more than 1."""
    pipeline: int = 1
    virtual: Optional[int] = None
    """Interleaved stages of each pipeline rank."""
    expert: int = 1
    generation_tensor: Optional[int] = None
    """Tensor parallel size of the generation engine, which has no other parallelism; None: `tensor`."""
    recompute: bool = False
    """Recompute activations in the backward pass."""

    def apply(self, recipe: Any) -> None:
        """Set these sizes in a recipe of `align`."""
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
        parallel = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "data parallel alone"
        parallel += ", activations recomputed" * self.recompute
        nodes, gpus = (f"{n} {name}{'s' * (n > 1)}" for n, name in ((self.nodes, "node"), (self.gpus, "GPU")))
        return f"{nodes} of {gpus} with 80 GB: {parallel}"


DESCRIPTIONS = {
    "sft": "Supervised fine-tuning of {title}, one epoch in steps of 128 responses.",
    "dpo": "DPO of {title}, one epoch in steps of 256 pairs.",
    "ipo": "IPO of {title}, one epoch in steps of 256 pairs.",
    "rpo": "RPO of {title}, from rows with rewards, one epoch in steps of 256 pairs.",
    "kto": "KTO of {title}, from pairs or single responses, one epoch in steps of 256.",
    "self_rewarding": "{title} answers, judges its answers and learns from them (arXiv 2401.10020), three iterations.",
    "meta_rewarding": "The same, and it learns to judge, too, in the first two of four iterations (arXiv 2407.19594): "
    "seven answers, eleven judgments of each.",
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


class AlignRecipes(NamedTuple):
    """Recipes of a model, by method."""

    sft: AlignRecipe
    dpo: AlignRecipe
    ipo: AlignRecipe
    rpo: AlignRecipe
    kto: AlignRecipe


class Recipes(NamedTuple):
    """The same, and those of pipelines in which the model generates responses and judges them."""

    sft: AlignRecipe
    dpo: AlignRecipe
    ipo: AlignRecipe
    rpo: AlignRecipe
    kto: AlignRecipe
    self_rewarding: PipelineRecipe
    meta_rewarding: PipelineRecipe


MODELS: dict[str, _Model] = {}
"""All that were described so far, by name."""


def recipes(name: str, title: str, model: Callable[[], run.Config], **options: Any) -> Recipes:
    """Recipes of a model, registered for the command line as `<name>_<method>`; arguments as in `align_recipes`."""
    aligns = align_recipes(name, title, model, **options)
    about = MODELS[name]
    return Recipes(
        *aligns,
        self_rewarding=_pipeline(about, "self_rewarding"),
        meta_rewarding=_pipeline(about, "meta_rewarding"),
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
) -> AlignRecipes:
    """Recipes of `align` alone, for a model that Megatron cannot generate with: too large, or attention of its own.

    Its pipelines can be put together of `generate_responses` with `engine=server` and the stages that follow it.

    Args:
        name: as NeMo names the model.
        title: for people.
        model: NeMo's model and config.
        source: where its weights are: `hf://name`.
        layout: parallel sizes for training all weights.
        adapters: parallel sizes for LoRA and DoRA.
        seq_length: tokens of a row, at most.
        apply_chat_template: whether a string is read as a user's message and an assistant's.
    """
    about = MODELS[name] = _Model(name, title, model, source, layout, adapters, seq_length, apply_chat_template)
    return AlignRecipes(**{method: _align(about, method) for method in AlignRecipes._fields})


def _align(about: _Model, method: str) -> AlignRecipe:
    sizes = {"global_batch_size": 128, "lr": 5e-6} if method == "sft" else {}

    def build(arguments: AlignArguments) -> run.Partial:
        return getattr(methods, method)(_recipe(about, arguments, **sizes))

    default = f"{about.name}_{method}"
    recipe = signatures.align_recipe(
        build, default_name=default, default_gpus=about.layout.gpus, default_seq_length=about.seq_length,
        default_train="train.jsonl", default_init_from=about.source,
    )  # fmt: skip
    example = f"nemo llm align --factory {default} -y data.train=train.jsonl"
    _register(about, method, recipe, align, example)
    return recipe


def _pipeline(about: _Model, method: str) -> PipelineRecipe:
    default = f"{about.name}_{method}"

    def recipe(
        dir: str = "runs",
        name: str = default,
        num_nodes: Optional[int] = None,
        num_gpus_per_node: int = about.layout.gpus,
        peft_scheme: Optional[str] = None,
        packed_sequence: bool = False,
        # The prompt of a judgment holds the prompt, the response and the rubric.
        seq_length: int = max(2048, about.seq_length),
        prompts: Union[str, list[str]] = "prompts.jsonl",
        init_from: str = about.source,
        variant: str = PAPER,
        iterations: Optional[int] = None,
        num_generations: Optional[int] = None,
        num_judgments: Optional[int] = None,
        beta: Union[float, list[float]] = 0.1,
        length_control: Optional[Union[float, list[float]]] = None,
        held_out: Optional[str] = None,
    ) -> run.Partial:
        def policy(**stage: str) -> run.Partial:
            arguments = AlignArguments(
                num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, peft_scheme=peft_scheme,
                packed_sequence=packed_sequence, seq_length=seq_length, validation=None, **stage,
            )  # fmt: skip
            return methods.dpo(_recipe(about, arguments, **_round_sizes(about)))

        layout = about.layout if peft_scheme is None else about.adapters
        settings = variant_of(method, variant)
        given = {"num_generations": num_generations, "num_judgments": num_judgments, "iterations": iterations}
        settings = settings._replace(**{name: value for name, value in given.items() if value is not None})
        return pipelines.judging_pipeline(
            policy,
            functools.partial(
                pipelines.engine,
                about.apply_chat_template,
                num_nodes or layout.nodes,
                num_gpus_per_node,
                layout.generation_tensor or layout.tensor,
            ),
            settings,
            meta=method == "meta_rewarding",
            length_control=settings.controls(settings.iterations) if length_control is None else length_control,
            dir=dir,
            name=name,
            init_from=init_from,
            prompts=prompts,
            beta=beta,
            held_out=held_out,
        )

    example = f"nemo llm self-reward --factory {default} -y generate.num_generations=8"
    _register(about, method, recipe, self_reward, example)
    return recipe


def _round_sizes(about: _Model) -> dict[str, Any]:
    """Return learning rate and batch of an iteration, as NVIDIA's guide of self-rewarding has them.

    1e-7 to 3e-7 for aligned models and 9e-7 to 3e-6 for base models, which have no chat template; 64 pairs, and 128
    for models from 70B.
    """
    billions = re.search(r"_(\d+)b", about.name)
    large = billions is not None and int(billions[1]) >= 70
    return {"lr": 3e-7 if about.apply_chat_template else 9e-7, "global_batch_size": 128 if large else 64}


def _register(about: _Model, method: str, recipe: Any, target: Any, example: str) -> None:
    doc = (
        f"{DESCRIPTIONS[method].format(title=about.title)}\n\n    {about.layout};\n    adapters (peft_scheme='lora'): "
        f"{about.adapters}.\n\n    CLI: `{example}`\n    "
    )
    module = f"{__package__}.{about.name}"
    signatures.register(recipe, target=target, module=module, method=method, model=about.name, doc=doc)


def _recipe(about: _Model, arguments: AlignArguments, *, lr: float = 9e-7, global_batch_size: int = 256) -> run.Partial:
    layout = about.layout if arguments.peft_scheme is None else about.adapters
    # Adapters want about ten times the learning rate of a full run (docs/hyperparameters.md).
    lr = lr if arguments.peft_scheme is None else 10 * lr
    recipe = methods.recipe(
        dataclasses.replace(arguments, num_nodes=arguments.num_nodes or layout.nodes),
        model=about.model(),
        lr=lr,
        min_lr=lr,
        global_batch_size=global_batch_size,
        apply_chat_template=about.apply_chat_template,
    )
    layout.apply(recipe)
    return recipe


def nemo(model: str, config: str, **settings: Any) -> run.Config:
    """A model of NeMo's by the names of its classes; the tokenizer comes from the checkpoint."""
    from nemo.collections import llm

    # A GPU's fused kernel rounds its gradient to bfloat16; log-probabilities stay in float32.
    settings = {"cross_entropy_loss_fusion": False} | settings
    return run.Config(getattr(llm, model), config=run.Config(getattr(llm, config), **settings))
