"""Export of adapters to a folder that Hugging Face's `peft` loads.

NeMo's own exporter omits DoRA's magnitudes, which `peft` then fills with garbage.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH
from torch import Tensor

from aligner.backend import safe_reading
from aligner.checkpoint import folders, source_files
from aligner.common.errors import CheckpointError
from aligner.model.adapters import base_of, peft_config_of

# Megatron's linear layers -> those of Hugging Face's Llama, in the order of their rows.
LAYERS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
PARTS = {
    "linear_in.weight": "lora_A.weight",
    "linear_out.weight": "lora_B.weight",
    "weight_magnitude": "lora_magnitude_vector",
}


def write(checkpoint: Path, output: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: `peft` has no counterpart of an adapted layer or of its kind of adapter.
    """
    from nemo.collections.llm.peft import DoRA
    from peft import LoraConfig

    model: Any = safe_reading.load_context(checkpoint / CONTEXT_PATH, "model")
    peft_config: Any = peft_config_of(checkpoint)
    tensors, targets = {}, set()
    for name, stacked in _load_adapters(checkpoint).items():
        match = re.fullmatch(r".*?decoder\.layers\.(.+)\.adapter\.(.+)", name)
        layer, part = match.groups() if match else ("", "")
        if layer not in LAYERS or part not in PARTS:
            raise CheckpointError(f"checkpoint: {checkpoint} holds {name}, which peft's Llama has no place for")
        for target, rows in zip(LAYERS[layer], _split_rows(stacked, layer, part, model.config), strict=True):
            targets.add(target.rpartition(".")[2])
            for i, tensor in enumerate(rows):
                tensors[f"base_model.model.model.layers.{i}.{target}.{PARTS[part]}"] = tensor.contiguous().clone()
    output.mkdir(parents=True)
    safetensors.torch.save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        base_model_name_or_path=_base_name(checkpoint),
        r=peft_config.dim,
        lora_alpha=peft_config.alpha,
        lora_dropout=peft_config.dropout,
        target_modules=sorted(targets),
        use_dora=isinstance(peft_config, DoRA),
        task_type="CAUSAL_LM",
    ).save_pretrained(str(output))


def _base_name(checkpoint: Path) -> str | None:
    """Return the Hugging Face folder or name of the base; None if the base was trained after its import."""
    base = base_of(checkpoint)
    assert base is not None
    name = source_files.origin(base).get("source")
    if name is None or (base / folders.METADATA_FILE).is_file():
        print(
            f"adapter_config.json: names no base, because {base} is not as it came from Hugging Face; export it, too "
            f"(nemo llm export-hf -y checkpoint={shlex.quote(str(base))} output=base), and load the adapters onto it"
        )
        return None
    return name


def _load_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """Load the weights of the adapters, stacked over layers: `[layers, ...]`."""
    stored: dict[str, Any] = safe_reading.read_metadata(checkpoint / WEIGHTS_PATH).state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if ".adapter." in name and not name.startswith(("optimizer.", "reference.")) and hasattr(meta, "size")
    }
    safe_reading.load_values(state, checkpoint / WEIGHTS_PATH)
    return state


def _split_rows(stacked: Tensor, layer: str, part: str, config: Any) -> list[Tensor]:
    """Split a stacked layer into Hugging Face's layers: they share linear_in, linear_out is cut."""
    if part == "linear_in.weight" or len(LAYERS[layer]) == 1:
        return [stacked] * len(LAYERS[layer])
    if layer == "mlp.linear_fc1":
        return list(stacked.chunk(2, dim=1))
    # One block per query group: its queries, then its key, then its value.
    groups, queries = config.num_query_groups, config.num_attention_heads // config.num_query_groups
    blocks = stacked.unflatten(1, (groups, queries + 2, -1))
    return [part.flatten(1, 3) for part in blocks.split([queries, 1, 1], dim=2)]
