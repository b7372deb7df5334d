"""Lightning data module: files -> examples in one global order -> the micro-batches of a rank.

Global batch k contains the same examples for every number of ranks and every micro-batch size
(`aligner.data.sampler`), so training can resume from `consumed_samples` on any number of GPUs.
`aligner.data.microbatches` splits global batches.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import lightning.pytorch as pl
import numpy as np

from aligner.backend import patches
from aligner.common import console

# Every recipe refers to this module, and a job imports the modules of its recipe before it builds anything.
# NeMo's configs are therefore patched before the first one is built.
console.silence_nemo()
patches.apply()

from nemo.lightning.data import WrappedDataLoader  # noqa: E402
from nemo.lightning.io.mixin import IOMixin  # noqa: E402
from nemo.lightning.megatron_parallel import MegatronStep  # noqa: E402
from nemo.lightning.pytorch.plugins import MegatronDataSampler  # noqa: E402

from aligner.common.errors import ConfigError  # noqa: E402
from aligner.data import (  # noqa: E402
    prepacked,
    sources,
    token_cache,
)
from aligner.data.batch import Split, collate  # noqa: E402
from aligner.data.chat_template import check_date, date_of  # noqa: E402
from aligner.data.dataset import TokenizedDataset  # noqa: E402
from aligner.data.examples import Kind, Overlong, check_share  # noqa: E402
from aligner.data.forms.form import Options, RankedPairs  # noqa: E402
from aligner.data.loader import StepSampler, loader  # noqa: E402
from aligner.data.microbatches import Batching, MicrobatchSplitter  # noqa: E402
from aligner.data.sampler import GlobalBatchSampler  # noqa: E402
from aligner.data.token_cache import TokenizationConfig, token_files  # noqa: E402

Files = Union[list[Any], str, dict[str, Any], Callable[[], str]]


class NoOpSampler(MegatronDataSampler):
    """No-op data sampler, which NeMo requires of a data module; `GlobalBatchDataset` splits global batches instead."""

    def setup(self, global_rank: int) -> None:
        """Do nothing: the number of micro-batches varies by step; `aligner.callbacks.step_preparation` sets it."""

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        return step

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        """Do nothing: `aligner.callbacks.metrics_callback` logs consumed samples, which NeMo logs here."""


class AlignDataModule(pl.LightningDataModule, IOMixin):
    """Tokenized examples from JSON lines: pairs or single responses, by objective (`aligner.data.examples`).

    Args:
        train: a file of rows (`aligner.data.rows`), a folder of files, a list, a blend
            `[0.7, "a.jsonl", 0.3, "b.jsonl"]` (`aligner.data.sources`), a folder written by
            `nemo llm pack-preferences`, or a callable that writes a file and returns its path.
        validation: likewise, without weights; each validation uses every row. None: no validation. Several sets by name
            (`{"easy": "a.jsonl", "hard": "b.jsonl"}`) are measured together, and each by itself as `val/NAME/...`.
        seq_length: maximum tokens of prompt and response together.
        micro_batch_size: examples per forward pass on one rank; packs, if examples are packed.
        global_batch_size: examples per optimizer step, over all ranks; packs, if packed ahead of time.
        seed: random seed of the training order.
        apply_chat_template: apply the tokenizer's chat template to string prompts (as one user message) and string
            responses (as the assistant's message); False tokenizes strings as they are.
        overlong: treatment of examples longer than `seq_length`: drop (and count), truncate, error.
        max_dropped_fraction: maximum fraction of a file's examples that may be dropped.
        batching: division of a global batch: padded, length_grouped, padding_free, packed
            (`aligner.data.microbatches`).
        packed_sequence_size: tokens of a pack; None: the maximum length of an example.
        cache_dir: folder of tokenized files (`aligner.data.token_cache`); None: `tokens` beside the runs.
        chat_template_kwargs: arguments of the chat template, as {"enable_thinking": False}; a row's
            `chat_template_kwargs` take precedence.
        date: day that a chat template with `strftime_now` writes, as 2026-11-30; None: the day on which the run began.
        ranked_pairs: pairs of a ranked list of responses: best_worst, neighbours, all (`aligner.data.forms`).
        ignore_columns: columns to leave out though their names say that they judge or say something.
        num_workers: processes per rank that build batches; 0 builds batches in the training process.
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
        apply_chat_template: bool = False,
        overlong: Overlong = "drop",
        max_dropped_fraction: float = 0.1,
        batching: Batching = "padded",
        packed_sequence_size: Optional[int] = None,
        cache_dir: Optional[str] = None,
        chat_template_kwargs: Optional[dict[str, Any]] = None,
        date: Optional[str] = None,
        ranked_pairs: RankedPairs = "best_worst",
        ignore_columns: Optional[list[str]] = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.seq_length, self.seed, self.apply_chat_template = seq_length, seed, apply_chat_template
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.overlong: Overlong = overlong
        self.batching: Batching = batching
        self.ranked_pairs: RankedPairs = ranked_pairs
        self.chat_template_kwargs, self.date = dict(chat_template_kwargs or {}), date
        self.ignore_columns = list(ignore_columns or ())
        check_date(date)
        self.packed_sequence_size, self.cache_dir = packed_sequence_size, cache_dir
        self.max_dropped_fraction, self.num_workers = max_dropped_fraction, num_workers
        self.datasets: dict[Split, TokenizedDataset] = {}
        self.packs: dict[Split, prepacked.Packs] = {}
        """Packs of the splits that were packed ahead of time."""
        self.consumed_samples = 0
        """Samples consumed by earlier jobs of this run, after `first_step` optimizer steps."""
        self.first_step = 0
        self.data_sampler = NoOpSampler(
            seq_len=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )
        self.template_date = ""
        """Day that the chat template writes into prompts; empty if it writes none."""
        self._resolved: dict[Split, Any] = {}
        self._weights: tuple[float, ...] = ()
        self._set_sizes: dict[str, int] = {}
        """Number of files of each named validation set."""
        self._pad_id, self._multiple, self._row_multiple, self._microbatch_multiple, self._steps = 0, 1, 1, 1, 0

    # ---- before training: all checks ----------------------------------------------------------------------------

    def _sources(self) -> Iterator[tuple[Split, Any]]:
        """Yield the source of each split; a callable source is called once, when its split is reached."""
        by_split: dict[Split, Any] = {"train": self.train, "validation": self.validation}
        for split, source in by_split.items():
            if source is not None and source != "":
                self._resolved[split] = self._resolved.get(split) or (source() if callable(source) else source)
                yield split, self._resolved[split]

    def check_rows(self, *, runs: Path) -> None:
        """Check the rows without a tokenizer, for use long before the tokenizer is available.

        Raises:
            RowError: a file is missing or a row is invalid.
        """
        for split, source in self._sources():
            if not prepacked.is_packed(source):
                for part in self._parts(split, source):
                    options = Options(self.ranked_pairs, tuple(self.ignore_columns))
                    token_cache.check_rows(part.path, self._cache_folder(runs), options)

    def tokenize(
        self,
        tokenizer: Any,
        *,
        kind: Kind,
        runs: Path,
        multiple: int = 1,
        row_multiple: int = 1,
        microbatch_multiple: int = 1,
    ) -> None:
        """Tokenize all splits into `cache_dir`, or into a folder beside the `runs`.

        In a batch, the positions of a sequence are a multiple of `multiple`, those of a row a multiple of
        `row_multiple`. The micro-batches of a step are a multiple of `microbatch_multiple`.

        Raises:
            RowError: see `aligner.data.token_cache.token_files`.
            ConfigError: likewise; or there are fewer examples than one global batch, or an example exceeds a pack.
        """
        settings = TokenizationConfig(
            kind,
            self.seq_length,
            self.apply_chat_template,
            self.overlong,
            self.chat_template_kwargs,
            date_of(tokenizer, self.date),
            self.ranked_pairs,
            self.ignore_columns,
        )
        self.template_date = settings.date
        folder = self._cache_folder(runs)
        for split, source in self._sources():
            if prepacked.is_packed(source):
                files, self.packs[split] = prepacked.load(Path(source), tokenizer, settings, f"data.{split}")
            else:
                parts = self._parts(split, source)
                self._store_weights(split, parts)
                files = token_files([part.path for part in parts], tokenizer, settings, folder, log=console.log_rank0)
            dataset = TokenizedDataset(files, mismatched_within=self.seq_length if kind == "unpaired" else None)
            for file in files:
                check_share(file.report, file.path, seq_length=self.seq_length, limit=self.max_dropped_fraction)
            self.datasets[split] = dataset
            one_sided = dataset.report.one_sided()
            if one_sided and split == "train":
                console.log_rank0(f"data.train: {one_sided}")
        if self.num_samples("train") < self.global_batch_size:
            noun = "packs" if "train" in self.packs else "examples"
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} {noun} a step, but {self._resolved['train']} holds "
                f"only {self.num_samples('train')} that can be used ({self.datasets['train'].report}); "
                "lower it or add data"
            )
        hf = getattr(tokenizer, "tokenizer", tokenizer)
        self._pad_id = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
        self._multiple, self._row_multiple, self._microbatch_multiple = multiple, row_multiple, microbatch_multiple
        for split, dataset in self.datasets.items():
            if self.batching == "packed" and split not in self.packs:
                room, field = self.cutting(split).packed_sequence_size, "data.packed_sequence_size"
                if self.packed_sequence_size and room != self.packed_sequence_size:
                    field += f" ({self.packed_sequence_size}, rounded down to a multiple of {row_multiple})"
                dataset.check_room(room, field, multiple=multiple)
        files = self.datasets["train"].files
        sizes = (len(self.packs["train"]),) if "train" in self.packs else tuple(map(len, files))
        self.order = GlobalBatchSampler(self.seed, sizes, self._weights)

    def check_vocabulary(self, tokenizer: Any, rows: int) -> None:
        """Check that every token has a row in an embedding of `rows` rows; a padding token without one is replaced.

        Raises:
            RowError: a token has none; the message has the first row with it.
        """
        hf = getattr(tokenizer, "tokenizer", tokenizer)
        if len(hf) <= rows:
            return
        if self._pad_id >= rows:
            self._pad_id = 0  # padding is masked, so any row will do
        for dataset in self.datasets.values():
            dataset.check_vocabulary(hf, rows)

    def _cache_folder(self, runs: Path) -> Path:
        return Path(self.cache_dir).expanduser() if self.cache_dir else runs / "tokens"

    def _parts(self, split: Split, source: Any) -> list[sources.DataFile]:
        """Return the files of a split; those of named validation sets one set after the other."""
        named = sources.by_name(source, f"data.{split}")
        if split == "validation":
            self._set_sizes = {name: len(parts) for name, parts in named.items() if name}
        elif "" not in named:
            raise ConfigError("data.train: is several sets by name, which data.validation can be; give a list")
        return [part for parts in named.values() for part in parts]

    @property
    def validation_sets(self) -> dict[str, tuple[int, int]]:
        """First and last row (excluded) of each named validation set."""
        starts, first, found = self.datasets["validation"].starts if self._set_sizes else [], 0, {}
        for name, count in self._set_sizes.items():
            found[name] = (int(starts[first]), int(starts[first + count]))
            first += count
        return found

    def _store_weights(self, split: Split, parts: Sequence[sources.DataFile]) -> None:
        if parts[0].weight is None:
            return
        if split == "validation":
            raise ConfigError("data.validation: has weights, but every row counts once in a validation; leave them out")
        self._weights = tuple(part.weight or 0.0 for part in parts)

    def num_samples(self, split: Split) -> int:
        """Return the number of samples: examples, or packs that were made ahead of time."""
        return len(self.packs[split]) if split in self.packs else self.datasets[split].num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the samples of an incomplete last global batch are dropped for that epoch."""
        return self.num_samples("train") // self.global_batch_size

    def plan(self, *, max_steps: int) -> None:
        """Set the number of optimizer steps of the training loader."""
        self._steps = max_steps

    def fingerprint(self, split: Split) -> str:
        """Return a hash of the tokens and rewards of a split, in file order."""
        return self.datasets[split].fingerprint

    # ---- loaders ----------------------------------------------------------------------------------------------

    def global_batch(self, step: int) -> np.ndarray:
        """Return the samples of an optimizer step, in order."""
        return self.order.global_batch(step, self.global_batch_size)

    def examples_in(self, step: int) -> int:
        """Return the number of examples in an optimizer step."""
        if "train" not in self.packs:
            return self.global_batch_size
        return sum(len(self.packs["train"][sample]) for sample in self.global_batch(step))

    def cutting(self, split: Split) -> MicrobatchSplitter:
        """Build the splitter of a split's global batches."""
        positions, step = self.datasets[split].positions(self._multiple), math.lcm(self._multiple, self._row_multiple)
        longest = -(-self.seq_length // step) * step
        return MicrobatchSplitter(
            self.batching,
            self.micro_batch_size,
            # The last sequence of a row includes the row's padding, so the capacity is a multiple of `row_multiple`.
            self.packed_sequence_size // self._row_multiple * self._row_multiple
            if self.packed_sequence_size
            else positions.shape[1] * longest,
            tokens=self.datasets[split].packed_tokens(self._multiple),
            longest=positions.max(axis=1),
            microbatch_multiple=self._microbatch_multiple,
            packs=self.packs.get(split),
        )

    def _loader(
        self, split: Split, samples: Callable[[int], np.ndarray], steps: StepSampler, mode: str
    ) -> WrappedDataLoader:
        splitter = self.cutting(split)
        build_batch = functools.partial(
            collate,
            pad_id=self._pad_id,
            packed=splitter.concatenated,
            multiple=self._multiple,
            row_multiple=self._row_multiple,
        )
        return loader(
            self.datasets[split],
            samples,
            steps,
            splitter=splitter,
            collate=build_batch,
            mode=mode,
            num_workers=self.num_workers,
        )

    def train_dataloader(self) -> WrappedDataLoader:
        """Build a loader of the run's remaining steps, in order."""
        trainer = self.trainer
        assert trainer is not None and self._steps > 0, "plan() comes before the loader"
        self.first_step = trainer.global_step
        steps = StepSampler(self.consumed_samples // self.global_batch_size, self._steps)
        return self._loader("train", self.global_batch, steps, "train")

    def val_dataloader(self) -> WrappedDataLoader:
        """Build a loader of every validation row once; copies that fill the last micro-batches have zero weight."""
        return self._fixed_order("validation", np.arange(self.num_samples("validation")))

    def scoring_dataloader(self, split: Split) -> WrappedDataLoader:
        """Build a loader of every row of a split once, mismatched rows last.

        Training rows are in the order of the first epoch. The first global batches therefore have the layout of
        training, and policy and reference agree on them bit by bit.
        """
        dataset, samples = self.datasets[split], np.arange(self.num_samples(split))
        if split == "train":
            samples = self.order.epoch(0)
        if split == "train" and self._weights:
            # An epoch of a blend omits some rows and repeats others.
            present, firsts = np.unique(samples, return_index=True)
            samples = np.concatenate([samples[np.sort(firsts)], np.setdiff1d(np.arange(dataset.num_examples), present)])
        others = np.arange(dataset.num_examples, len(dataset)) + len(self.packs.get(split, ()))
        return self._fixed_order(split, samples, others)

    def _fixed_order(self, split: Split, *groups: np.ndarray) -> WrappedDataLoader:
        size = self.global_batch_size
        batches = [samples[i : i + size] for samples in groups for i in range(0, len(samples), size)]
        return self._loader(split, batches.__getitem__, StepSampler(0, len(batches)), "validation")

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the number of consumed samples."""
        trainer = self.trainer
        assert trainer is not None
        steps = trainer.global_step - self.first_step
        return {"consumed_samples": self.consumed_samples + steps * self.global_batch_size}

    def identity(self) -> dict[str, Any]:
        """Return statistics and hashes of the training data, which a resumed run compares with its own."""
        return {
            "data.train": f"{self.datasets['train'].report} ({self.fingerprint('train')[:16]})",
            "data.date": self.template_date,
            "data.chat_template_kwargs": self.chat_template_kwargs,
            "data.train.weights": list(self._weights),
            "data.train.packs": self.packs["train"].fingerprint if "train" in self.packs else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `consumed_samples` of an earlier job; `aligner.train.resume_settings` has checked the data."""
        self.consumed_samples = int(state_dict["consumed_samples"])
