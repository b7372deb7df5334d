"""A checkpoint as a model that answers or scores: loaded by NeMo, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import CONTEXT_PATH

from aligner.backend import distributed, hardware, safe_reading, threads
from aligner.checkpoint import folders, huggingface, source_files, tokenizers
from aligner.data.chat_template import TemplateSettings
from aligner.model import adapters, architecture


@dataclass(frozen=True)
class Restored:
    """A model of a checkpoint, in evaluation mode."""

    core: GPTModel
    """Megatron's model."""
    config: Any
    tokenizer: Any
    checkpoint: Path
    """The NeMo checkpoint, imported if need be."""
    ends: frozenset[int]
    """Tokens that end an answer of the Hugging Face model that the checkpoint descends from."""

    def template(self, kwargs: dict[str, Any] | None = None, date: str | None = None) -> TemplateSettings:
        """Return what the chat template depends on: as it was in training, unless it is given."""
        trained: dict[str, Any] = folders.metadata(self.checkpoint).get("settings", {})
        if kwargs is None:
            kwargs = trained.get("data.chat_template_kwargs")
        return TemplateSettings(kwargs, date or trained.get("data.date") or "")

    def applies_template(self) -> bool:
        """Return whether strings went through the chat template in training."""
        return bool(folders.metadata(self.checkpoint).get("settings", {}).get("data.apply_chat_template", False))


def find(name: str, cache: Path) -> Path:
    """Return the NeMo checkpoint of a name: a checkpoint, a run, adapters, or a model of Hugging Face, imported once.

    Raises:
        CheckpointError: there is none.
    """
    importable = huggingface.is_importable(name)
    path = huggingface.import_once(name, cache) if importable else Path(name).expanduser()
    return distributed.of_rank_zero(lambda: folders.resolve_checkpoint(path, "checkpoint"))


def restore(
    checkpoint: Path,
    prepare: Callable[[Any], None],
    *,
    devices: int = 1,
    num_nodes: int = 1,
    tensor_model_parallel_size: int = 1,
) -> Restored:
    """Load a checkpoint, with its base if it holds adapters; `prepare` changes the model's configuration before.

    Every rank must call.
    """
    from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model

    base_checkpoint = adapters.base_of(checkpoint)
    source = base_checkpoint or checkpoint
    model: Any = safe_reading.load_context(source / CONTEXT_PATH, "model")
    model.tokenizer = tokenizers.load_tokenizer(checkpoint)
    model.model_transform = None
    config = model.config
    threads.choose_num_threads(config.hidden_size)
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        setattr(config, name, 1)
    config.virtual_pipeline_model_parallel_size, config.sequence_parallel = None, False
    config.recompute_granularity = config.recompute_method = config.recompute_num_layers = None
    architecture.match_vocab_size(model, source, tensor_model_parallel_size=tensor_model_parallel_size)
    prepare(config)
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=tensor_model_parallel_size, setup_optimizers=False, ckpt_async_save=False
    )
    trainer: Any = nl.Trainer(
        accelerator="auto",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        plugins=hardware.precision_plugin(),
        logger=False,
        enable_model_summary=False,
    )
    strategy.store = distributed.fresh_store(strategy.cluster_environment)
    _setup_trainer_and_restore_model(source, trainer, model)
    if base_checkpoint is not None:
        adapters.peft_config_of(checkpoint)(model)
        adapters.load(trainer, checkpoint)
    module: Any = trainer.strategy.megatron_parallel[0].eval()
    while not isinstance(module, GPTModel):  # unwrap NeMo's module and its precision wrapper
        module = module.module
    kept = source_files.kept_in(source)
    ends = frozenset(source_files.ends(kept)) if kept else frozenset()
    return Restored(module, config, model.tokenizer, checkpoint, ends)
