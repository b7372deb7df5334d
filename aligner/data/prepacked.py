"""Packed folder: tokens and packs made ahead of time.

A run can pack each global batch by itself (`data.batching=packed`), which keeps its number of pairs. Packing all data
at once fills packs better; a global batch then counts packs. The folder contains its own tokens, so it can be copied to
a cluster:

    part-000/, ...    one folder per file of rows (`aligner.data.token_cache`)
    packs.arrow       an Arrow stream; column `rows`: row numbers of each pack, consecutive over all parts
    meta.json         packing settings, statistics, source files
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from aligner.common.errors import ConfigError
from aligner.common.files import atomic_write
from aligner.common.hashing import sealed, tokenizer_hash, unsealed
from aligner.data import sources
from aligner.data.dataset import TokenizedDataset
from aligner.data.packing import Algorithm, fill, pack
from aligner.data.token_cache import VERSION, TokenFile, TokenizationConfig, token_files

PACKS, META = "packs.arrow", "meta.json"


class Packs(Sequence[np.ndarray]):
    """Row numbers of each pack, memory-mapped."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        digest = hashlib.sha256()
        with (folder / PACKS).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != fingerprint:
            raise ValueError(f"{PACKS} is not what was written")
        with pa.memory_map(str(folder / PACKS)) as mapped:
            self._rows = pa.ipc.open_stream(mapped).read_all().column("rows").combine_chunks()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, pack: Any) -> np.ndarray:
        return self._rows[int(pack)].values.to_numpy()


def is_packed(source: Any) -> bool:
    """Return whether `source` is a packed folder."""
    return isinstance(source, str | Path) and (Path(source).expanduser() / PACKS).is_file()


def load(folder: Path, tokenizer: Any, settings: TokenizationConfig, field: str) -> tuple[list[TokenFile], Packs]:
    """Open the examples and packs of a folder; `field` is the argument that contains its path.

    Raises:
        ConfigError: the folder is damaged, or was made with another tokenizer or other settings than this run has.
    """
    folder = folder.expanduser()
    try:
        meta = unsealed((folder / META).read_text())
        files = [TokenFile(folder / f"part-{i:03}", path) for i, path in enumerate(meta["paths"])]
        packs = Packs(folder, meta["fingerprint"])
        packed = {name: files[0].meta[name] for name in ("tokenizer", "version")} | files[0].meta["settings"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{field}: {folder} is damaged ({type(error).__name__}: {error}); run nemo llm pack-preferences again"
        ) from None
    expected: dict[str, Any] = {**asdict(settings), "version": VERSION}
    expected["tokenizer"] = tokenizer_hash(getattr(tokenizer, "tokenizer", tokenizer))
    for name, value in expected.items():
        if packed[name] != value:
            found = "another tokenizer or chat template" if name == "tokenizer" else f"{name}={packed[name]!r}"
            wanted = "the model's" if name == "tokenizer" else f"{value!r}"
            raise ConfigError(
                f"{field}: {folder} was packed with {found}, and this run has {wanted}; "
                "run nemo llm pack-preferences again"
            )
    return files, packs


def write_packed_folder(
    source: Any,
    hf: Any,
    settings: TokenizationConfig,
    folder: Path,
    *,
    packed_sequence_size: int | None,
    algorithm: Algorithm,
    seed: int,
) -> tuple[TokenizedDataset, dict[str, Any]]:
    """Tokenize and pack rows into a new folder; return the examples and the metadata of the packs.

    Raises:
        RowError: a row is invalid.
        ConfigError: files have weights, or one example is longer than a pack.
    """
    parts = sources.resolve_files(source, "train")
    if any(part.weight is not None for part in parts):
        raise ConfigError(
            "train: has weights, which choose other rows in every epoch; packs are made once: leave the weights out, "
            "or set data.batching=packed in the run"
        )
    with atomic_write(folder) as partial:
        partial.mkdir()
        files = [
            file
            for i, part in enumerate(parts)
            for file in token_files([part.path], hf, settings, partial / f"made-{i}")
        ]
        for number, file in enumerate(files):
            file.folder.rename(partial / f"part-{number:03}")
            shutil.rmtree(partial / f"made-{number}")
        dataset = TokenizedDataset(
            files, mismatched_within=settings.seq_length if settings.kind == "unpaired" else None
        )
        capacity = packed_sequence_size or len(settings.responses) * settings.seq_length
        meta = _write_packs(partial, dataset, capacity, algorithm=algorithm, seed=seed)
        meta["paths"] = [str(part.path) for part in parts]
        (partial / META).write_text(json.dumps(sealed(meta), indent=1))
    return dataset, meta


def _write_packs(
    folder: Path, dataset: TokenizedDataset, capacity: int, *, algorithm: Algorithm, seed: int
) -> dict[str, Any]:
    """Pack the examples, write the packs, and return their metadata."""
    lengths = dataset.packed_tokens()[: dataset.num_examples]
    if not len(lengths):
        raise ConfigError(f"train: holds no example that can be used ({dataset.report})")
    dataset.check_room(capacity, "packed_sequence_size")
    packs = pack(lengths, capacity, algorithm=algorithm, seed=seed)
    rows = pa.array(packs, pa.list_(pa.int64()))
    with pa.ipc.new_stream(str(folder / PACKS), pa.schema([("rows", rows.type)])) as writer:
        writer.write_batch(pa.record_batch([rows], names=["rows"]))
    return {
        "packed_sequence_size": capacity,
        "algorithm": algorithm,
        "seed": seed,
        "packs": len(packs),
        "efficiency": fill(lengths, packs, capacity),
        "examples_per_pack": dataset.num_examples / len(packs),
        "fingerprint": hashlib.sha256((folder / PACKS).read_bytes()).hexdigest(),
    }
