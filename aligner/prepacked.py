"""Packs made ahead of time: a folder of tokens and of which examples share a pack.

A run can pack every global batch by itself (`data.batching=packed`), which keeps the number of pairs in it. Packing
all of the data at once fills packs better, and a global batch then counts packs. The folder holds its own tokens, so
that it can be shipped to a cluster:

    part-000/, ...    one folder a file of rows (`aligner.cache`)
    packs.arrow       an Arrow stream, column `rows`: the examples of each pack, numbered through all parts
    meta.json         what it was made with
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pyarrow as pa

from aligner import sources
from aligner.cache import VERSION, Settings, TokenFile, token_files
from aligner.corpus import Corpus
from aligner.errors import ConfigError
from aligner.examples import Kind, OverLong
from aligner.files import written_whole
from aligner.naming import tokenizer_hash
from aligner.packing import Algorithm, fill, pack

PACKS, META = "packs.arrow", "meta.json"


class Packs(Sequence[np.ndarray]):
    """The rows of each pack, memory-mapped."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        with pa.memory_map(str(folder / PACKS)) as mapped:
            self._rows = pa.ipc.open_stream(mapped).read_all().column("rows").combine_chunks()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, pack: Any) -> np.ndarray:
        return self._rows[int(pack)].values.to_numpy()


def is_packed(source: Any) -> bool:
    """Whether `source` is such a folder."""
    return isinstance(source, str | Path) and (Path(source).expanduser() / PACKS).is_file()


def load(folder: Path, tokenizer: Any, settings: Settings, field: str) -> tuple[list[TokenFile], Packs]:
    """The examples and packs of a folder; `field` is the argument that names it.

    Raises:
        ConfigError: it was made with another tokenizer or other settings than this run has.
    """
    folder = folder.expanduser()
    try:
        meta = json.loads((folder / META).read_text())
        files = [TokenFile(folder / f"part-{i:03}", path) for i, path in enumerate(meta["paths"])]
        packs = Packs(folder, meta["fingerprint"])
        theirs = {name: files[0].meta[name] for name in ("tokenizer", "version")} | files[0].meta["settings"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{field}: {folder} is damaged ({type(error).__name__}: {error}); run nemo llm pack-preferences again"
        ) from None
    ours: dict[str, Any] = {**asdict(settings), "version": VERSION}
    ours["tokenizer"] = tokenizer_hash(getattr(tokenizer, "tokenizer", tokenizer))
    for name, value in ours.items():
        if theirs[name] != value:
            what = "another tokenizer or chat template" if name == "tokenizer" else f"{name}={theirs[name]!r}"
            now = "the model's" if name == "tokenizer" else f"{value!r}"
            raise ConfigError(
                f"{field}: {folder} was packed with {what}, and this run has {now}; run nemo llm pack-preferences again"
            )
    return files, packs


def pack_preferences(
    train: Union[list[Any], str],
    tokenizer: str,
    output: str,
    seq_length: int = 2048,
    pack_size: Optional[int] = None,
    algorithm: Algorithm = "first_fit_shuffle",
    seed: int = 1234,
    kind: Kind = "pairs",
    as_chat: bool = False,
    over_long: OverLong = "drop",
    global_batch_size: int = 256,
) -> Path:
    """Tokenise and pack rows ahead of time; train on the result with data.train=OUTPUT.

    A run can also pack as it goes (data.batching=packed), without this command.

    Args:
        train: a file of rows, a folder of them, or a list.
        tokenizer: folder or name of a Hugging Face tokenizer, or a NeMo checkpoint or run that carries one.
        output: folder to write; must not exist.
        seq_length: most tokens of prompt and response together; the run's data.seq_length.
        pack_size: tokens of a pack; None: as many as the longest example could have.
        algorithm: first_fit_shuffle, first_fit_decreasing, best_fit_decreasing (`aligner.packing`).
        seed: of the order of first_fit_shuffle.
        kind: pairs, unpaired (for kto) or demonstrations (for supervised fine-tuning).
        as_chat: the run's data.as_chat.
        over_long: the run's data.over_long.
        global_batch_size: pairs of an optimizer step, to be told how many packs that is.

    Raises:
        RowError: a row is not as it must be.
        ConfigError: an argument is not, or an example alone is longer than a pack.
    """
    from aligner.named_tokenizer import named_tokenizer

    folder = Path(output).expanduser()
    if folder.exists():
        raise ConfigError(f"output: {folder} exists already; remove it or name another folder")
    settings = Settings(kind, seq_length, as_chat, over_long)
    parts, hf = sources.parts(train, "train"), named_tokenizer(tokenizer)
    if any(part.weight is not None for part in parts):
        raise ConfigError(
            "train: has weights, which choose other rows in every epoch; packs are made once: leave the weights out, "
            "or set data.batching=packed in the run"
        )
    with written_whole(folder) as partial:
        partial.mkdir()
        made = [
            file
            for i, part in enumerate(parts)
            for file in token_files([part.path], hf, settings, partial / f"made-{i}")
        ]
        for number, file in enumerate(made):
            file.folder.rename(partial / f"part-{number:03}")
            shutil.rmtree(partial / f"made-{number}")
        corpus = Corpus(made, mismatched_within=seq_length if kind == "unpaired" else None)
        meta = _write_packs(
            partial, corpus, pack_size or len(settings.responses) * seq_length, algorithm=algorithm, seed=seed
        )
        meta["paths"] = [str(part.path) for part in parts]
        (partial / META).write_text(json.dumps(meta, indent=1))
    _tell(corpus, meta, settings, output, global_batch_size)
    return folder


def _tell(corpus: Corpus, meta: dict[str, Any], settings: Settings, output: str, global_batch_size: int) -> None:
    noun, mean = "pairs" if settings.kind == "pairs" else "responses", meta["examples_per_pack"]
    print(corpus.report)
    print(f"Packing is {meta['efficiency']:.2%} efficient: {meta['packs']} packs of {meta['pack_size']} tokens")
    print(f">>> average number of {noun} per pack is n = {mean:.2f}")
    print(
        f">>> a global batch counts packs: instead of data.global_batch_size={global_batch_size} ({noun}) "
        f"set data.global_batch_size={max(1, round(global_batch_size / mean))} (packs), data.micro_batch_size=1"
    )
    print(f">>> train with data.train={output} data.seq_length={settings.seq_length}", end=" ")
    print(f"data.as_chat={settings.as_chat} data.over_long={settings.over_long}")


def _write_packs(folder: Path, corpus: Corpus, capacity: int, *, algorithm: Algorithm, seed: int) -> dict[str, Any]:
    """Pack, write the packs, and return what is to be said of them."""
    lengths = corpus.packed_tokens()[: corpus.trained]
    if not len(lengths):
        raise ConfigError(f"train: holds no example that can be used ({corpus.report})")
    corpus.check_room(capacity, "pack_size")
    packs = pack(lengths, capacity, algorithm=algorithm, seed=seed)
    rows = pa.array(packs, pa.list_(pa.int64()))
    with pa.ipc.new_stream(str(folder / PACKS), pa.schema([("rows", rows.type)])) as writer:
        writer.write_batch(pa.record_batch([rows], names=["rows"]))
    return {
        "pack_size": capacity,
        "algorithm": algorithm,
        "seed": seed,
        "packs": len(packs),
        "efficiency": fill(lengths, packs, capacity),
        "examples_per_pack": corpus.trained / len(packs),
        "fingerprint": hashlib.sha256((folder / PACKS).read_bytes()).hexdigest(),
    }
