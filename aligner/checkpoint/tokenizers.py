"""Tokenizers: the one that a NeMo checkpoint carries, or one named on a command line."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from nemo.lightning.ckpt_utils import CONTEXT_PATH

from aligner.checkpoint import folders
from aligner.common.errors import ConfigError
from aligner.common.files import atomic_write


def load_tokenizer(checkpoint: Path, *, kept_in: Path | None = None) -> Any:
    """The tokenizer that a NeMo checkpoint carries.

    With `kept_in`, its files are copied there first, and will be found after the checkpoint is gone: a run keeps its
    newest checkpoint only, and NeMo writes a tokenizer whose files are gone into the next one as a name to look up.
    """
    from nemo.lightning.io import load_context

    context = checkpoint / CONTEXT_PATH
    if kept_in is not None:
        digest = hashlib.sha256()
        for file in sorted(path for path in context.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(context)} {file.stat().st_size} ".encode() + file.read_bytes())
        kept = kept_in / f"context-{digest.hexdigest()[:8]}"
        if not kept.exists():
            try:
                with atomic_write(kept) as partial:
                    shutil.copytree(context, partial)
            except OSError:
                # Another rank was faster; anything else is an error.
                if not kept.exists():
                    raise
        context = kept
    return load_context(context, "model.tokenizer")


def named_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer from a folder, a hub's name, or what a NeMo checkpoint or run carries.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if (path / "checkpoints").is_dir() or (path / "context").is_dir():
        held = load_tokenizer(folders.resolve_checkpoint(path, "tokenizer"))
        return getattr(held, "tokenizer", held)
    from nemo.collections.common.tokenizers import AutoTokenizer

    try:
        # NeMo's, as a run has it: it sets special tokens anew, which changes how some of them are read.
        return AutoTokenizer(str(path) if path.exists() else name.removeprefix("hf://")).tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"tokenizer: {name} is neither a folder with a Hugging Face tokenizer, nor its name on the hub, nor a NeMo "
            f"checkpoint ({str(error).splitlines()[0]})"
        ) from None
