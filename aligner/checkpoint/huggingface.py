"""Import of Hugging Face models and `.nemo` archives as NeMo checkpoints, and export of aligned models."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aligner.checkpoint import nemo1_archive, source_files
from aligner.checkpoint.imports import config_checks, file_checks
from aligner.checkpoint.safety import integrity
from aligner.common.console import log
from aligner.common.errors import CheckpointError
from aligner.common.files import PARTIAL, atomic_write
from aligner.common.locking import Lock
from aligner.common.process_pool import hidden_main_module

VERSION = 2
"""Raise it when an import of the same files would be another one; earlier imports are then made again."""
REFUSED = 3
"""Exit code of an import in a process of its own whose last line says why the model is refused."""

PYTHON = sys.executable
"""Interpreter of the process of an import."""


def is_importable(path: str) -> bool:
    """Return whether a path is `hf://name`, a folder with a config.json, or a `.nemo` archive."""
    return (
        path.startswith("hf://")
        or (Path(path).expanduser() / "config.json").is_file()
        or nemo1_archive.is_archive(path)
    )


def import_hf(source: str, output: str, compare: bool = True) -> Path:
    """Convert a Hugging Face model, or a `.nemo` archive of NeMo 1, to a NeMo checkpoint.

    Configuration, generation settings, tokenizer and chat template stay beside the weights, for `export-hf`.

    Args:
        source: `hf://name`, a folder that transformers loads, or a `.nemo` archive.
        output: checkpoint folder to write; must not exist.
        compare: compare log-probabilities of 384 tokens with transformers' model; the checkpoint records the result.

    Raises:
        CheckpointError: the model is not supported, or differs from transformers' own, or the output exists.
    """
    target = Path(output).expanduser()
    if target.exists():
        raise CheckpointError(f"output: {target} exists already; remove it or name another folder")
    if nemo1_archive.is_archive(source):
        return _import_archive(Path(source).expanduser(), target)
    name = source.removeprefix("hf://")
    folder, config = check_source(name)
    kind = config["model_type"]
    from aligner.backend import patches

    patches.apply()
    from aligner.backend.distributed import preserved_environment
    from aligner.checkpoint import connectors
    from aligner.model.architecture import vocabulary_rows

    with (
        atomic_write(target) as partial,
        preserved_environment(),
        hidden_main_module(),
        tempfile.TemporaryDirectory() as own,
    ):
        readable = _readable_folder(name, folder, config, Path(own) / "source")
        tokenizer = Path(own) / "nemo_tokenizer"
        importer = connectors.importer(kind, readable, tokenizer_folder=tokenizer, compares=compare)
        importer(partial)
        config_checks.rows(name, stored=vocabulary_rows(partial) or 0, vocabulary=config.get("vocab_size", 0))
        kept = partial / source_files.FOLDER
        source_files.copy(folder, kept)
        origin: dict[str, Any] = {"source": str(folder.resolve()) if folder == Path(name).expanduser() else name}
        outside = file_checks.tokens_without_row(folder, vocabulary_rows(partial) or 0)
        if outside:
            print(f"{name}: {outside}")
        if importer.comparison is not None:
            origin["comparison"] = importer.comparison.as_dict()
            print(importer.comparison)
        (kept / source_files.ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        integrity.write(partial)
    print(f"written: {target}")
    return target


def check_source(name: str) -> tuple[Path, dict[str, Any]]:
    """Check a Hugging Face model without loading it; return its folder and the content of its config.json.

    Raises:
        CheckpointError: the model cannot be imported, or would be altered.
    """
    folder = source_files.local_folder(name)
    config = source_files.read_json(folder / source_files.CONFIG)
    kind = config.get("model_type")
    if kind not in config_checks.ASSUMED:
        raise CheckpointError(
            f"source: {name} is of the architecture {kind!r}; can be imported: {', '.join(config_checks.ASSUMED)}"
        )
    file_checks.check(name, folder, config)
    config_checks.check(name, config)
    return folder, config


def _readable_folder(name: str, folder: Path, config: dict[str, Any], target: Path) -> Path:
    """Make a folder of links in which NeMo's importers find the files, and the keys of config.json, that they read."""
    target.mkdir()
    for path in folder.resolve().iterdir():
        if path.name != source_files.CONFIG:
            (target / path.name).symlink_to(path)
    readable = config_checks.as_transformers_4(name, config)
    (target / source_files.CONFIG).write_text(json.dumps(readable))
    if not (target / source_files.GENERATION).exists():
        from transformers import AutoConfig, GenerationConfig

        GenerationConfig.from_model_config(AutoConfig.from_pretrained(target)).save_pretrained(target)
    return target


def _import_archive(archive: Path, target: Path) -> Path:
    from aligner.backend import patches

    patches.apply()
    from aligner.backend.distributed import preserved_environment
    from aligner.checkpoint.nemo1_import import convert

    with atomic_write(target) as partial, preserved_environment(), hidden_main_module():
        convert(archive, partial)
        integrity.write(partial)
    return target


def export_hf(checkpoint: str, output: str) -> Path:
    """Export a NeMo checkpoint (its folder, or the latest of a run) to a folder that `transformers` loads.

    The folder holds the files of the Hugging Face model that training started from, byte for byte, and new weights in
    the same precision. What training changed of the files is listed: another tokenizer, tokens that end an answer.
    Adapters are exported without their base model, to a folder that `peft` loads on top of it.

    Args:
        checkpoint: checkpoint folder, or run folder.
        output: folder to write; must not exist.

    Raises:
        CheckpointError: `checkpoint` is not a checkpoint, NeMo cannot export its model, or the output exists.
    """
    from aligner.backend import patches

    patches.apply()
    from aligner.backend.distributed import preserved_environment
    from aligner.checkpoint import connectors, export_files, peft_export
    from aligner.checkpoint.folders import resolve_checkpoint
    from aligner.model.adapters import base_of

    source = resolve_checkpoint(Path(checkpoint).expanduser(), "checkpoint")
    target = Path(output).expanduser()
    if target.exists():
        raise CheckpointError(f"output: {target} exists already; remove it or name another folder")
    with atomic_write(target) as partial, preserved_environment(), hidden_main_module():
        if base_of(source):
            peft_export.write(source, partial)
        else:
            exporter = connectors.exporter(source)
            exporter(partial)
            export_files.complete(partial, source, exporter.trained_with)
        export_files.open_to_readers(partial)
    print(f"written: {target}")
    return target


def import_once(source: str, cache: Path, *, compare: bool = True) -> Path:
    """Return the NeMo checkpoint of a Hugging Face model; the first call imports it into `cache`, see `import_hf`.

    If several ranks or runs call at once, one converts. The conversion has a process of its own, because it sets up
    a one-rank Megatron that the training could not tear down cleanly.
    """
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / cache_name(source)
    if not target.exists() and not nemo1_archive.is_archive(source):
        check_source(source.removeprefix("hf://"))  # before a process that takes a minute
    lock = Lock(cache / f"{target.name}.lock")
    lock.acquire(waiting=lambda owner: log(f"{source}: another process is importing it{owner}; waiting for it to end"))
    try:
        if not target.exists():
            for stale in cache.glob(f"{target.name}.*{PARTIAL}"):  # nobody writes it while it is locked
                shutil.rmtree(stale, ignore_errors=True)
            done = subprocess.run(
                [PYTHON, "-m", "aligner.checkpoint.huggingface", source, str(target), str(int(compare))],
                env=_environment_without_ranks(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode == REFUSED:
                raise CheckpointError(f"resume.restore_config.path: {done.stdout.splitlines()[-1]}")
            if done.returncode:
                raise CheckpointError(f"resume.restore_config.path: importing {source} failed:\n{done.stdout[-3000:]}")
    finally:
        lock.release()
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
    return f"{folder.name}-{hashlib.sha256(chr(10).join([f'import {VERSION}', *parts]).encode()).hexdigest()[:12]}"


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


if __name__ == "__main__":
    # Megatron's writer starts a process that imports this module again, so heavy imports are inside functions.
    try:
        import_hf(sys.argv[1], sys.argv[2], compare=bool(int(sys.argv[3])))
    except CheckpointError as refusal:
        print(" ".join(str(refusal).splitlines()))
        sys.exit(REFUSED)
