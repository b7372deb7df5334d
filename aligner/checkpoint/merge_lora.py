"""Merging of LoRA and DoRA adapters into the base weights."""

from pathlib import Path
from typing import Any

from aligner.checkpoint.source_files import SourceFiles
from aligner.common.errors import CheckpointError
from aligner.common.files import atomic_write
from aligner.common.process_pool import hidden_main_module


def merge_lora(checkpoint: str, output: str) -> Path:
    """Merge the adapters of a LoRA or DoRA run into the base model and write a plain NeMo checkpoint.

    The sum is computed in float32 and stored in the base model's precision.

    Args:
        checkpoint: checkpoint folder with adapters, or run folder.
        output: checkpoint folder to write; must not exist.

    Raises:
        CheckpointError: the checkpoint holds no adapters, or the output exists.
    """
    from aligner.backend import patches

    patches.apply()
    from nemo import lightning as nl
    from nemo.lightning.ckpt_utils import CONTEXT_PATH
    from nemo.lightning.io.connector import ModelConnector
    from nemo.lightning.io.pl import TrainerContext

    from aligner.backend.distributed import preserved_environment
    from aligner.checkpoint.folders import resolve_checkpoint
    from aligner.checkpoint.safety import integrity
    from aligner.model.adapters import base_of, load, peft_config_of

    source, target = resolve_checkpoint(Path(checkpoint).expanduser(), "checkpoint"), Path(output).expanduser()
    base = base_of(source)
    if base is None:
        raise CheckpointError(f"checkpoint: {source} holds no adapters; it is whole by itself")
    if target.exists():
        raise CheckpointError(f"output: {target} exists already; remove it or name another folder")
    peft: Any = peft_config_of(source)
    with atomic_write(target) as partial, preserved_environment(), hidden_main_module():
        strategy: Any = nl.MegatronStrategy(ddp="pytorch", setup_optimizers=False, ckpt_async_save=False)
        trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=strategy)
        model, _ = ModelConnector(str(base)).nemo_load(base, trainer=trainer)
        model.trainer = trainer
        peft(model)
        load(trainer, source)
        _merge_adapters(model)
        trainer.save_checkpoint(partial, weights_only=True)
        TrainerContext.from_trainer(trainer).io_dump(partial / CONTEXT_PATH, yaml_attrs=["model"])
        SourceFiles(base).write(partial)
        integrity.write(partial)
    print(f"written: {target}")
    return target


def _merge_adapters(model: Any) -> None:
    """Replace wrapped linear layers by linear layers with merged adapters."""
    from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterWrapper):
                setattr(module, name, _merged(child))


def _merged(wrapper: Any) -> Any:
    import torch
    from nemo.collections.llm.peft.dora import DoRALinear

    adapter, linear = wrapper.adapter, wrapper.to_wrap
    with torch.no_grad():
        delta = adapter.linear_out.weight.float() @ adapter.linear_in.weight.float()
        merged = linear.weight.float() + adapter.alpha / adapter.dim * delta
        if isinstance(wrapper, DoRALinear):
            # Liu et al. 2024, arXiv 2402.09353, equation 5: the magnitude is learned beside the direction.
            magnitude = adapter.get_weight_magnitude().float() / torch.linalg.norm(merged, dim=1)
            merged = magnitude.unsqueeze(1) * merged
        linear.weight.data = merged.to(linear.weight.dtype)
    return linear
