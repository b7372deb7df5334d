"""The Lightning data module: files -> examples in one global order -> the micro-batches of a rank.

Global batch k holds the same examples whatever the number of ranks and the micro-batch size (`aligner.order`), so
`consumed_samples` says where a run goes on, on any number of GPUs. How it is cut is the matter of `aligner.cutting`.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union, get_args

import lightning.pytorch as pl
import numpy as np
import torch

from aligner import console, cpu

# Every recipe names this module, and a job imports what its recipe names before it builds anything: so NeMo's
# configs are patched before the first of them is made.
console.hush()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from nemo.lightning.data import WrappedDataLoader  # noqa: E402
from nemo.lightning.io.mixin import IOMixin  # noqa: E402
from nemo.lightning.megatron_parallel import MegatronStep  # noqa: E402
from nemo.lightning.pytorch.plugins import MegatronDataSampler  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from aligner import order, prepacked, sources  # noqa: E402
from aligner.batch import Batch, Item, Split, collate  # noqa: E402
from aligner.cache import Settings, check_rows, token_file  # noqa: E402
from aligner.corpus import Corpus  # noqa: E402
from aligner.cutting import Batching, Cutting  # noqa: E402
from aligner.errors import ConfigError  # noqa: E402
from aligner.examples import Kind, OverLong, check_share  # noqa: E402

Files = Union[str, list[Any], Callable[[], str]]


class Steps(Dataset[list[Batch]]):
    """Global batches as one rank sees them: entry i is the micro-batches of step `first` + i."""

    def __init__(
        self,
        corpus: Corpus,
        units: Callable[[int], np.ndarray],
        steps: range,
        *,
        cutting: Cutting,
        rank: int,
        ranks: int,
        collate: Callable[[list[Item]], Batch],
    ) -> None:
        self.corpus, self.units, self.steps, self.cutting = corpus, units, steps, cutting
        self.rank, self.ranks, self.collate = rank, ranks, collate

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> list[Batch]:
        micros = self.cutting(self.units(self.steps[place]), self.ranks)[self.rank]
        return [self.collate([self._item(row, valid) for row, valid in micro]) for micro in micros]

    def _item(self, row: int, valid: bool) -> Item:
        other = self.corpus.mismatched(row)
        return Item(row, self.corpus[row], valid, None if other is None else Item(other, self.corpus[other], valid))


class Sampler(MegatronDataSampler):
    """What NeMo asks of a data module; the cutting into micro-batches, its own task, is done in `Steps`."""

    def setup(self, global_rank: int) -> None:
        """Nothing: how many micro-batches a step has may change from step to step (`aligner.lookahead` says it)."""

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        return step

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        """NeMo logs consumed samples here; `aligner.watching` does, with everything else."""


class AlignDataModule(pl.LightningDataModule, IOMixin):
    """Examples from JSON-lines files: pairs, or single responses, as the objective asks (`aligner.examples`).

    Args:
        train: a file of rows (`aligner.rows`), a folder of them, a list, a blend `[0.7, "a.jsonl", 0.3, "b.jsonl"]`
            (`aligner.sources`), a folder that `nemo llm pack-preferences` made, or something that makes a file and
            returns its path.
        validation: likewise, without weights; every row counts in every validation. None: no validation.
        seq_length: most tokens of prompt and response together.
        micro_batch_size: examples of one forward pass on one rank; packs, if they are packed.
        global_batch_size: examples of one optimizer step, over all ranks; packs, if they were packed ahead of time.
        seed: of the order of the training examples.
        as_chat: read string prompts as one user message and string responses as the assistant's, and put both
            through the tokenizer's chat template; False takes strings as they are.
        over_long: what becomes of examples longer than `seq_length`: drop (and count), truncate, refuse.
        max_dropped_share: stop if more than this share of a file's examples would be dropped.
        batching: how a global batch is cut: padded, length_grouped, padding_free, packed (`aligner.cutting`).
        pack_size: tokens of a pack; None: as many as the longest example could have.
        cache_dir: where tokenised files are kept (`aligner.cache`); None: `tokens` beside the runs.
        num_workers: processes that build batches on each rank; 0 builds them in the training process.
    """

    def __init__(
        self,
        train: Files,
        validation: Optional[Files] = None,
        *,
        seq_length: int = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int = 64,
        seed: int = 1234,
        as_chat: bool = False,
        over_long: OverLong = "drop",
        max_dropped_share: float = 0.1,
        batching: Batching = "padded",
        pack_size: Optional[int] = None,
        cache_dir: Optional[str] = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.seq_length, self.seed, self.as_chat = seq_length, seed, as_chat
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.over_long: OverLong = over_long
        self.batching: Batching = batching
        self.pack_size, self.cache_dir = pack_size, cache_dir
        self.max_dropped_share, self.num_workers = max_dropped_share, num_workers
        self.examples: dict[Split, Corpus] = {}
        self.packs: dict[Split, prepacked.Packs] = {}
        """Of the splits that were packed ahead of time."""
        self.consumed_samples = 0
        """Of earlier jobs of this run, where `first_step` optimizer steps had been made."""
        self.first_step = 0
        self.data_sampler = Sampler(
            seq_len=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )
        self._weights: tuple[float, ...] = ()
        self._pad_id, self._multiple, self._row_multiple, self._steps = 0, 1, 1, 0

    # ---- before training: everything that can be refused is refused here ------------------------------------

    @functools.cached_property
    def _sources(self) -> dict[Split, Any]:
        """What was given for each split; files that have to be made are made now."""
        given: dict[Split, Any] = {"train": self.train, "validation": self.validation}
        return {split: x() if callable(x) else x for split, x in given.items() if x is not None and x != ""}

    def read(self) -> None:
        """Read and check the rows without a tokenizer, where it will be a while before there is one.

        Raises:
            RowError: a file or row is not as it must be.
        """
        for split, source in self._sources.items():
            if not prepacked.is_packed(source):
                for part in sources.parts(source, f"data.{split}"):
                    check_rows(part.path)

    def check(self, *, data_parallel_size: int) -> None:
        """Check the batch sizes against the layout.

        Raises:
            ConfigError: a size is not positive, or the global batch cannot be cut into micro-batches.
        """
        if not self.train:
            raise ConfigError("data.train: is empty; give a file of preference rows")
        for name, kinds in (("over_long", OverLong), ("batching", Batching)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"data.{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(kinds))}")
        for name in ("micro_batch_size", "global_batch_size", "seq_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}: must be at least 1, found {getattr(self, name)}")
        if self.pack_size is not None and self.batching != "packed":
            raise ConfigError(
                f"data.pack_size: {self.pack_size}, but data.batching is {self.batching!r}, which has no packs; set "
                "data.batching=packed, or leave data.pack_size None"
            )
        per_pass = data_parallel_size * (1 if self.batching == "packed" else self.micro_batch_size)
        if self.global_batch_size % per_pass:
            sizes = "" if self.batching == "packed" else f"data.micro_batch_size={self.micro_batch_size} times "
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} cannot be cut into micro-batches: "
                f"{sizes}{data_parallel_size} data-parallel ranks is {per_pass}; use a multiple of {per_pass}"
            )

    def prepare(self, tokenizer: Any, *, kind: Kind, runs: Path, multiple: int = 1, row_multiple: int = 1) -> None:
        """Have everything tokenised, in `cache_dir` or beside the `runs`.

        Each sequence will take a multiple of `multiple` positions in a batch, and each row of `row_multiple`.

        Raises:
            RowError, ConfigError: see `aligner.cache.token_file`; or fewer examples than one global batch, or one that
            no pack has room for.
        """
        settings = Settings(kind, self.seq_length, self.as_chat, self.over_long)
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else runs / "tokens"
        for split, source in self._sources.items():
            if prepacked.is_packed(source):
                files, self.packs[split] = prepacked.load(Path(source), tokenizer, settings, f"data.{split}")
            else:
                parts = sources.parts(source, f"data.{split}")
                self._take_weights(split, parts)
                files = [token_file(part.path, tokenizer, settings, folder, say=console.say) for part in parts]
            corpus = Corpus(files, mismatched_within=self.seq_length if kind == "unpaired" else None)
            check_share(corpus.report, seq_length=self.seq_length, limit=self.max_dropped_share)
            self.examples[split] = corpus
        if self.units("train") < self.global_batch_size:
            noun = "packs" if "train" in self.packs else "examples"
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} {noun} a step, but {self.train} holds only "
                f"{self.units('train')} that can be used ({self.examples['train'].report}); lower it or add data"
            )
        hf = getattr(tokenizer, "tokenizer", tokenizer)
        self._pad_id = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
        self._multiple, self._row_multiple = multiple, row_multiple
        for split, corpus in self.examples.items():
            self._check_room(split, corpus)

    def _take_weights(self, split: Split, parts: Sequence[sources.Part]) -> None:
        if parts[0].weight is None:
            return
        if split == "validation":
            raise ConfigError("data.validation: has weights, but every row counts once in a validation; leave them out")
        self._weights = tuple(part.weight or 0.0 for part in parts)

    def _check_room(self, split: Split, corpus: Corpus) -> None:
        if self.batching != "packed" or split in self.packs:
            return
        cutting = self._cutting(split)
        tokens = cutting.tokens
        if len(tokens) and tokens.max() > cutting.pack_size:
            raise ConfigError(
                f"data.pack_size: {cutting.pack_size} tokens, but {corpus[int(tokens.argmax())].source} alone takes "
                f"{tokens.max()} (prompt and response, of each response); raise it, or lower data.seq_length="
                f"{self.seq_length}"
            )

    def units(self, split: Split) -> int:
        """What a global batch counts: examples, or packs that were made ahead of time."""
        return len(self.packs[split]) if split in self.packs else self.examples[split].trained

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; what does not fill a last global batch is left out of that epoch."""
        return self.units("train") // self.global_batch_size

    def plan(self, *, max_steps: int) -> None:
        """Fix how many optimizer steps the training loader must feed."""
        self._steps = max_steps

    def fingerprint(self, split: Split) -> str:
        """Hash of the tokens and rewards of a split, in file order."""
        parts = [file.meta["fingerprint"] for file in self.examples[split].files]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    # ---- loaders ----------------------------------------------------------------------------------------------

    def global_batch(self, step: int) -> np.ndarray:
        """The units of an optimizer step, in order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        place = within * self.global_batch_size
        return self._epoch(epoch)[place : place + self.global_batch_size]

    def examples_in(self, step: int) -> int:
        """How many examples an optimizer step learns from."""
        if "train" not in self.packs:
            return self.global_batch_size
        return sum(len(self.packs["train"][unit]) for unit in self.global_batch(step))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._weights:
            sizes = tuple(map(len, self.examples["train"].files))
            return order.blended(self.seed, epoch, sizes, self._weights)
        return order.permutation(self.seed, epoch, self.units("train"))

    def _cutting(self, split: Split) -> Cutting:
        places = self.examples[split].positions(self._multiple)
        return Cutting(
            self.batching,
            self.micro_batch_size,
            # What rounds a row up belongs to its last sequence, and must find room as well.
            (self.pack_size or places.shape[1] * self.seq_length) // self._row_multiple * self._row_multiple,
            tokens=places.sum(axis=1),
            longest=places.max(axis=1),
            packs=self.packs.get(split),
        )

    def _loader(
        self, split: Split, units: Callable[[int], np.ndarray], steps: range, *, cutting: Cutting, mode: str
    ) -> WrappedDataLoader:
        lay = functools.partial(
            collate,
            pad_id=self._pad_id,
            packed=cutting.end_to_end,
            multiple=self._multiple,
            row_multiple=self._row_multiple,
        )
        known = parallel_state.is_initialized()
        view = Steps(
            self.examples[split],
            units,
            steps,
            cutting=cutting,
            rank=parallel_state.get_data_parallel_rank() if known else 0,
            ranks=parallel_state.get_data_parallel_world_size() if known else 1,
            collate=lay,
        )
        return WrappedDataLoader(
            mode=mode,
            dataset=view,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> WrappedDataLoader:
        """All that is left of the run, in its order."""
        trainer = self.trainer
        assert trainer is not None and self._steps > 0, "plan() comes before the loader"
        self.first_step = trainer.global_step
        done = self.consumed_samples // self.global_batch_size
        steps = range(done, done + self._steps - self.first_step)
        return self._loader("train", self.global_batch, steps, cutting=self._cutting("train"), mode="train")

    def val_dataloader(self) -> WrappedDataLoader:
        """Every validation row once; copies that fill up the last micro-batches weigh nothing."""
        return self._whole("validation", np.arange(self.units("validation")), self._cutting("validation"))

    def scoring_dataloader(self, split: Split) -> WrappedDataLoader:
        """Every row of a split once, mismatched ones after the others.

        Training rows come in the order of the first epoch: so the first global batches lie as they will in training,
        and policy and reference agree there to the last bit.
        """
        corpus, cutting = self.examples[split], self._cutting(split)
        if split in self.packs:
            units = self._epoch(0) if split == "train" else np.arange(self.units(split))
            missing = np.zeros(0, np.int64)
        else:
            rows = self._epoch(0) if split == "train" else np.arange(corpus.trained)
            _, firsts = np.unique(rows, return_index=True)
            units = rows[np.sort(firsts)]
            missing = np.setdiff1d(np.arange(corpus.trained), units)
        others = np.concatenate([missing, np.arange(corpus.trained, len(corpus))])
        if split in self.packs:
            others += len(self.packs[split])
        return self._whole(split, units, cutting, others)

    def _whole(
        self, split: Split, units: np.ndarray, cutting: Cutting, others: np.ndarray | None = None
    ) -> WrappedDataLoader:
        size = self.global_batch_size
        batches = [units[i : i + size] for i in range(0, len(units), size)]
        if others is not None:
            batches += [others[i : i + size] for i in range(0, len(others), size)]
        return self._loader(split, batches.__getitem__, range(len(batches)), cutting=cutting, mode="validation")

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and of which data."""
        trainer = self.trainer
        assert trainer is not None
        steps = trainer.global_step - self.first_step
        return {
            "consumed_samples": self.consumed_samples + steps * self.global_batch_size,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """What the order of the training examples depends on."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "train": self.fingerprint("train"),
            "weights": list(self._weights),
            "packs": self.packs["train"].fingerprint if "train" in self.packs else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another job of this run stopped.

        Raises:
            ConfigError: the training data, the seed or the global batch size are not those of that job.
        """
        for name, value in self._identity().items():
            if state_dict[name] != value:
                field = "train" if name in ("weights", "packs") else name
                raise ConfigError(
                    f"data.{field}: the checkpoint was trained with other data or order ({name} {state_dict[name]}, "
                    f"now {value}), so rows would be repeated or skipped; restore it, or start under another log.name"
                )
        self.consumed_samples = int(state_dict["consumed_samples"])
