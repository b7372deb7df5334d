"""Models and tokenizers of the Hugging Face hub, and machines without a way to it."""

from __future__ import annotations

import functools
import os

from aligner.common import network


@functools.cache
def is_reachable() -> bool:
    """Return whether the hub's server accepts connections; with a proxy, that is left to the proxy."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        network.check_reachable(constants.ENDPOINT)
    except OSError:
        return False
    return True


def name_or_folder(name: str) -> str:
    """Return a name on the hub, or the folder of what was downloaded earlier where the hub cannot be reached.

    Raises:
        OSError: neither can be had.
    """
    if is_reachable():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise OSError("the hub cannot be reached from here, and nothing of that name was downloaded earlier") from None
