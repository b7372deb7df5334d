"""Tokenizers of NeMo checkpoints, and tokenizers by name."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from nemo.lightning.ckpt_utils import CONTEXT_PATH

from aligner.backend import safe_reading
from aligner.checkpoint import folders
from aligner.common import hub
from aligner.common.errors import ConfigError
from aligner.common.files import atomic_write


def load_tokenizer(checkpoint: Path, *, kept_in: Path | None = None) -> Any:
    """Load the tokenizer of a NeMo checkpoint.

    With `kept_in`, its files are copied there first and outlast the checkpoint. A run keeps its newest checkpoint
    only, and NeMo saves a tokenizer without files as a name to look up.
    """
    context = checkpoint / CONTEXT_PATH
    if kept_in is not None:
        digest = hashlib.sha256()
        for file in sorted(path for path in context.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(context)} {file.stat().st_size} ".encode() + file.read_bytes())
        copy = kept_in / f"context-{digest.hexdigest()[:8]}"
        if not copy.exists():
            try:
                with atomic_write(copy) as partial:
                    shutil.copytree(context, partial)
            except OSError:
                # Another rank was faster; anything else is an error.
                if not copy.exists():
                    raise
        context = copy
    return safe_reading.load_context(context, "model.tokenizer")


def named_tokenizer(name: str) -> Any:
    """Load a Hugging Face tokenizer from a folder or the hub, or the tokenizer of a NeMo checkpoint or run.

    Raises:
        ConfigError: the name refers to no tokenizer.
    """
    path = Path(name).expanduser()
    if (path / "checkpoints").is_dir() or (path / "context").is_dir():
        tokenizer = load_tokenizer(folders.resolve_checkpoint(path, "tokenizer", verify=False))
        return getattr(tokenizer, "tokenizer", tokenizer)
    from nemo.collections.common.tokenizers import AutoTokenizer

    try:
        # NeMo's class, as in a run: it sets special tokens again, which changes how some of them are tokenized.
        return AutoTokenizer(str(path) if path.exists() else hub.name_or_folder(name.removeprefix("hf://"))).tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"tokenizer: {name} is neither a folder with a Hugging Face tokenizer, nor its name on the hub, nor a NeMo "
            f"checkpoint ({str(error).splitlines()[0]})"
        ) from None
