"""Import of Hugging Face models and `.nemo` archives as NeMo checkpoints, and export of aligned models."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from aligner.checkpoint import import_checks, nemo1_archive
from aligner.common.errors import CheckpointError
from aligner.common.files import atomic_write

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


def is_importable(path: str) -> bool:
    """Return whether a path is `hf://name`, a folder with a config.json, or a `.nemo` archive."""
    return (
        path.startswith("hf://")
        or (Path(path).expanduser() / "config.json").is_file()
        or nemo1_archive.is_archive(path)
    )


def import_hf(source: str, output: str) -> Path:
    """Convert a Hugging Face model, or a `.nemo` archive of NeMo 1, to a NeMo checkpoint.

    Args:
        source: `hf://name`, a folder that transformers loads, or a `.nemo` archive.
        output: checkpoint folder to write; must not exist.

    Raises:
        CheckpointError: the architecture of the source is not supported, or the output exists.
    """
    target = Path(output).expanduser()
    if target.exists():
        raise CheckpointError(f"output: {target} exists already; remove it or name another folder")
    if nemo1_archive.is_archive(source):
        return _import_archive(Path(source).expanduser(), target)
    name = source.removeprefix("hf://")
    config = _config(name)
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"source: {name} is of the architecture {kind!r}; can be imported: {', '.join(ARCHITECTURES)}"
        )
    import_checks.check(name, config)
    from aligner.backend import patches

    patches.apply()
    from nemo.collections import llm

    from aligner.backend.distributed import preserved_environment
    from aligner.model.architecture import vocabulary_rows

    model, sizes = (getattr(llm, name) for name in ARCHITECTURES[kind])
    # The sizes are placeholders: the importer reads the real ones from the Hugging Face config.
    placeholder = model(sizes(num_layers=1, hidden_size=8, num_attention_heads=1))
    with atomic_write(target) as partial, preserved_environment():
        llm.import_ckpt(placeholder, f"hf://{name}", output_path=partial)
        import_checks.rows(name, stored=vocabulary_rows(partial) or 0, vocabulary=config.get("vocab_size", 0))
    return target


def _import_archive(archive: Path, target: Path) -> Path:
    from aligner.backend import patches

    patches.apply()
    from aligner.backend.distributed import preserved_environment
    from aligner.checkpoint.nemo1_import import convert

    with atomic_write(target) as partial, preserved_environment():
        convert(archive, partial)
    return target


def export_hf(checkpoint: str, output: str) -> Path:
    """Export a NeMo checkpoint (its folder, or the latest of a run) to a folder that `transformers` loads.

    Adapters are exported without their base model, to a folder that `peft` loads on top of it.

    Args:
        checkpoint: checkpoint folder, or run folder.
        output: folder to write; must not exist.

    Raises:
        CheckpointError: `checkpoint` is not a checkpoint, NeMo cannot export its model, or the output exists.
    """
    from aligner.backend import patches

    patches.apply()
    from nemo.collections import llm
    from nemo.lightning.ckpt_utils import CONTEXT_PATH
    from nemo.lightning.io import load_context

    from aligner.backend.distributed import preserved_environment
    from aligner.checkpoint import peft_export
    from aligner.checkpoint.folders import resolve_checkpoint
    from aligner.model.adapters import base_of

    source = resolve_checkpoint(Path(checkpoint).expanduser(), "checkpoint")
    target = Path(output).expanduser()
    if target.exists():
        raise CheckpointError(f"output: {target} exists already; remove it or name another folder")
    kind = type(load_context(source / CONTEXT_PATH, "model"))
    if kind is llm.GPTModel:
        raise CheckpointError(
            f"checkpoint: {source} holds a plain GPTModel (GPT-2B), which NeMo has no Hugging Face form of; "
            "use it as a NeMo checkpoint"
        )
    with atomic_write(target) as partial, preserved_environment():
        if base_of(source):
            peft_export.write(source, partial)
        else:
            llm.export_ckpt(path=source, target="hf", output_path=partial)
    return target


def import_once(source: str, cache: Path) -> Path:
    """Return the NeMo checkpoint of a Hugging Face model; the first call imports it into `cache`.

    If several ranks or runs call at once, one converts. The conversion has a process of its own, because it sets up
    a one-rank Megatron that the training could not tear down cleanly.
    """
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / cache_name(source)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            done = subprocess.run(
                [sys.executable, "-m", "aligner.checkpoint.huggingface", source, str(target)],
                env=_environment_without_ranks(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise CheckpointError(f"resume.restore_config.path: importing {source} failed:\n{done.stdout[-3000:]}")
    return target


def source_identity(source: str) -> dict[str, Any]:
    """Identify the weights that a checkpoint's or Hugging Face model's name refers to at present."""
    from aligner.checkpoint import folders

    if is_importable(source):
        return {"checkpoint": cache_name(source)}
    checkpoint = folders.resolve_checkpoint(Path(source).expanduser(), "checkpoint")
    return {"checkpoint": str(checkpoint.resolve()), "written": folders.mtime_ns(checkpoint)}


def cache_name(source: str) -> str:
    """Return a folder name that changes with the files of a local model."""
    name = source.removeprefix("hf://")
    folder = Path(name).expanduser()
    parts = [name]
    if folder.is_dir():
        parts = [str(folder.resolve())]
        parts += [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(folder.iterdir())]
    elif folder.is_file():
        parts = [str(folder.resolve()), f"{folder.stat().st_size} {folder.stat().st_mtime_ns}"]
    return f"{folder.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:12]}"


def _environment_without_ranks() -> dict[str, str]:
    """Return the environment without the launcher's variables of ranks."""
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return {
        name: value
        for name, value in os.environ.items()
        if name not in launcher and not name.startswith(("TORCHELASTIC_", "PET_", "SLURM_"))
    }


def _config(name: str) -> dict[str, Any]:
    path = Path(name).expanduser() / "config.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"source: {path} is not JSON ({error})") from None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"source: {name} is neither a folder with config.json nor to be had from the hub ({first})"
        ) from None


if __name__ == "__main__":
    # Megatron's writer starts a process that imports this module again, so heavy imports are inside functions.
    import_hf(sys.argv[1], sys.argv[2])
