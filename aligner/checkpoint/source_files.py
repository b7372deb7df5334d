"""Files of a Hugging Face model beside its weights: they stay with its checkpoint and all that descend from it.

Configuration, generation settings, tokenizer, chat template and licence are copied when a model is imported, into each
checkpoint of a run that starts from it, and back out when it is exported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aligner.common import hub
from aligner.common.errors import CheckpointError

FOLDER = "huggingface"
"""Folder in a checkpoint."""
ORIGIN = "origin.json"
"""File beside them: where the model came from, and the comparison of its log-probabilities after the import."""
CONFIG, GENERATION = "config.json", "generation_config.json"
TEMPLATES = "additional_chat_templates"
KEPT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""Ends of names that are kept, beside licences."""
INDEX = (".safetensors.index.json", ".bin.index.json")
"""Ends of names of tables of contents of weights, which are written anew."""
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")


def local_folder(name: str) -> Path:
    """Return the folder of a model, downloaded if `name` is one on the hub.

    Raises:
        CheckpointError: there is no such model.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return folder
    from huggingface_hub import snapshot_download

    ignored = ["original/*", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.pth"]
    try:
        hub.name_or_folder(name)
        found = Path(snapshot_download(name, ignore_patterns=[*ignored, "*.bin"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"source: {name} is neither a folder with config.json nor to be had from the hub ({first})"
        ) from None
    if not (found / CONFIG).is_file():
        raise CheckpointError(f"source: {name} has no config.json on the hub, so it is not a model for transformers")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"source: {path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"source: {path} holds no JSON object")
    return value


def names(folder: Path) -> list[str]:
    """List the files to keep of a model's folder, relative to it."""
    top = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    kept = [n for n in top if (n.endswith(KEPT) and not n.endswith(INDEX)) or n.upper().startswith(LICENCES)]
    return sorted(kept + [f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")])


def copy(folder: Path, target: Path, *, only: Iterable[str] | None = None) -> None:
    """Copy the files to keep of a folder, byte for byte, with the permissions of new files."""
    for name in names(folder) if only is None else only:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)


class SourceFiles:
    """Files of the model that a run started from, in memory: the checkpoint that holds them may be removed."""

    def __init__(self, checkpoint: Path | None) -> None:
        folder = kept_in(checkpoint) if checkpoint else None
        self._contents = {name: (folder / name).read_bytes() for name in names(folder)} if folder else {}

    def write(self, checkpoint: Path) -> None:
        """Write them into a checkpoint."""
        for name, content in self._contents.items():
            path = checkpoint / FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def kept_in(checkpoint: Path) -> Path | None:
    """Return the folder of the files that a checkpoint holds; None if its model did not come from Hugging Face."""
    folder = checkpoint / FOLDER
    return folder if (folder / CONFIG).is_file() else None


def ends(folder: Path) -> list[int]:
    """Return the tokens at which transformers ends an answer of the model in a folder."""
    for name in (GENERATION, CONFIG):
        found = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def origin(checkpoint: Path) -> dict[str, Any]:
    """Return where a checkpoint's model came from: `source`, a folder or a name on the hub, and `comparison`."""
    path = checkpoint / FOLDER / ORIGIN
    return read_json(path) if path.is_file() else {}
