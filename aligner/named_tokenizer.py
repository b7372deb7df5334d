"""The tokenizer that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligner.errors import ConfigError


def named_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer from a folder, a hub's name, or what a NeMo checkpoint or run carries.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if (path / "checkpoints").is_dir() or (path / "context").is_dir():
        from aligner.checkpoints import require, tokenizer_of

        held = tokenizer_of(require(path, "tokenizer"))
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
