"""NeMo's importers and exporters, with a model's own configuration and tokenizer, and nothing at fixed paths."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from nemo.collections import llm
from nemo.lightning.ckpt_utils import CONTEXT_PATH
from nemo.lightning.io.connector import ModelConnector

from aligner.backend import safe_reading
from aligner.checkpoint import source_files
from aligner.checkpoint.imports.comparison import Comparison, compare
from aligner.common.errors import CheckpointError

# Hugging Face's model_type -> NeMo's classes in nemo.collections.llm.
ARCHITECTURES = {
    "llama": ("LlamaModel", "LlamaConfig"),
    "mistral": ("MistralModel", "MistralConfig7B"),
    "mixtral": ("MixtralModel", "MixtralConfig"),
    "nemotron": ("NemotronModel", "NemotronConfig"),
    "qwen2": ("Qwen2Model", "Qwen2Config"),
    "qwen3": ("Qwen3Model", "Qwen3Config"),
    "qwen3_moe": ("Qwen3Model", "Qwen3Config"),
    "gemma2": ("Gemma2Model", "Gemma2Config"),
}


class Importer(ModelConnector):
    """What an import does beside NeMo's importer of the architecture, which `importer` adds as a base."""

    compares = True
    comparison: Comparison | None = None
    tokenizer_folder: Path

    def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
        """Save the tokenizer into the import's own folder; NeMo uses one of the whole machine, and runs its code."""
        from transformers import AutoTokenizer

        # Otherwise transformers asks, at a terminal, whether to run the folder's Python files.
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name_or_path, trust_remote_code=False)
        tokenizer.save_pretrained(self.tokenizer_folder)
        return str(self.tokenizer_folder)

    @property
    def config(self) -> Any:
        """Return NeMo's configuration, with lengths and tied embeddings as they are in the source."""
        from transformers import AutoConfig

        config, source = super().config, AutoConfig.from_pretrained(str(self), trust_remote_code=False)  # type: ignore[misc]
        # Qwen2's and Mistral's importers untie; Mistral's takes its length from the window, Qwen3's from nowhere.
        ours: dict[str, Any] = {
            "share_embeddings_and_output_weights": bool(source.tie_word_embeddings),
            "seq_length": source.max_position_embeddings,
            # Kept as the file that it is; transformers refuses to save some that it reads.
            "generation_config": None,
        }
        if config.window_size is not None:
            # transformers counts the token itself, Megatron only those to its left, and looks masks up by a tuple.
            ours["window_size"] = (source.sliding_window - 1, 0)
        for name, value in ours.items():
            setattr(config, name, value)
            if hasattr(config, "__io__"):
                setattr(config.__io__, name, value)  # what a checkpoint is read from again
        return config

    def convert_state(self, source: Any, target: Any) -> Any:
        """Convert the weights, and compare the two models while both are in memory."""
        converted = super().convert_state(source, target)  # type: ignore[misc]
        self.comparison = compare(source, target) if self.compares else None
        return converted


class Exporter(ModelConnector):
    """What an export does beside NeMo's exporter of the architecture, which `exporter` adds as a base."""

    source_config: Path | None = None
    """Folder with the config.json that the model came with."""
    trained_with: Any = None
    """The checkpoint's tokenizer."""

    @functools.cached_property
    def config(self) -> Any:
        """Return the source's own configuration; NeMo's, completed by the tokenizer's tokens, if there is none."""
        if self.source_config is not None:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(self.source_config, trust_remote_code=False)
        config: Any = super().config  # type: ignore[misc]
        hf = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # type: ignore[attr-defined]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(hf, name))
        return config

    def convert_state(self, source: Any, target: Any, *args: Any) -> Any:
        """Convert the weights; tied embeddings stay tied, and the precision is the one that the model came in."""
        converted: Any = super().convert_state(source, target, *args)  # type: ignore[misc]
        converted.tie_weights()
        stored = self.config.torch_dtype if self.source_config is not None else None
        return converted.to(stored) if stored is not None else converted


def importer(kind: str, source: Path, *, tokenizer_folder: Path, compares: bool) -> Importer:
    """Return the importer of a model_type for the folder `source`."""
    model, sizes = (getattr(llm, name) for name in ARCHITECTURES[kind])
    # The sizes are placeholders: the importer reads the real ones from the Hugging Face config.
    placeholder = model(sizes(num_layers=1, hidden_size=8, num_attention_heads=1))
    theirs = type(placeholder.importer(f"hf://{source}"))
    ours: Any = type("Importer", (Importer, theirs), {})(str(source))
    ours.tokenizer_folder, ours.compares = tokenizer_folder, compares
    return ours


def exporter(checkpoint: Path) -> Exporter:
    """Return the exporter of a checkpoint's model.

    Raises:
        CheckpointError: NeMo has none for it.
    """
    model: Any = safe_reading.load_context(checkpoint / CONTEXT_PATH, "model")
    if type(model) is llm.GPTModel:
        raise CheckpointError(
            f"checkpoint: {checkpoint} holds a plain GPTModel (GPT-2B), which NeMo has no Hugging Face form of; "
            "use it as a NeMo checkpoint"
        )
    theirs = type(model.exporter("hf", checkpoint))
    ours: Any = type("Exporter", (Exporter, theirs), {})(str(checkpoint))
    ours.source_config, ours.trained_with = source_files.kept_in(checkpoint), model.tokenizer
    return ours
