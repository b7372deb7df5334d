"""The Lightning data module: files -> examples in one global order -> the micro-batches of a rank.

Global batch k holds the same examples whatever the number of ranks and the micro-batch size (`aligner.data.sampler`), so
`consumed_samples` says where a run goes on, on any number of GPUs. How it is cut is the matter of `aligner.data.microbatches`.
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

# Every recipe names this module, and a job imports what its recipe names before it builds anything: so NeMo's
# configs are patched before the first of them is made.
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
from aligner.data.dataset import TokenizedDataset  # noqa: E402
from aligner.data.examples import Kind, Overlong, check_share  # noqa: E402
from aligner.data.loader import StepSampler, loader  # noqa: E402
from aligner.data.microbatches import Batching, MicrobatchSplitter  # noqa: E402
from aligner.data.sampler import GlobalBatchSampler  # noqa: E402
from aligner.data.token_cache import TokenizationConfig, token_files  # noqa: E402

Files = Union[list[Any], str, Callable[[], str]]


class NoOpSampler(MegatronDataSampler):
    """What NeMo asks of a data module; the cutting into micro-batches, its own task, is done in `GlobalBatchDataset`."""

    def setup(self, global_rank: int) -> None:
        """Nothing: how many micro-batches a step has may change from step to step (`aligner.callbacks.step_preparation` says it)."""

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        return step

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        """NeMo logs consumed samples here; `aligner.callbacks.metrics_callback` does, with everything else."""


class AlignDataModule(pl.LightningDataModule, IOMixin):
    """Examples from JSON-lines files: pairs, or single responses, as the objective asks (`aligner.data.examples`).

    Args:
        train: a file of rows (`aligner.data.rows`), a folder of them, a list, a blend `[0.7, "a.jsonl", 0.3, "b.jsonl"]`
            (`aligner.data.sources`), a folder that `nemo llm pack-preferences` made, or something that makes a file and
            returns its path.
        validation: likewise, without weights; every row counts in every validation. None: no validation.
        seq_length: most tokens of prompt and response together.
        micro_batch_size: examples of one forward pass on one rank; packs, if they are packed.
        global_batch_size: examples of one optimizer step, over all ranks; packs, if they were packed ahead of time.
        seed: of the order of the training examples.
        apply_chat_template: read string prompts as one user message and string responses as the assistant's, and put both
            through the tokenizer's chat template; False takes strings as they are.
        overlong: what becomes of examples longer than `seq_length`: drop (and count), truncate, refuse.
        max_dropped_fraction: stop if more than this share of a file's examples would be dropped.
        batching: how a global batch is cut: padded, length_grouped, padding_free, packed (`aligner.data.microbatches`).
        packed_sequence_size: tokens of a pack; None: as many as the longest example could have.
        cache_dir: where tokenized files are kept (`aligner.data.token_cache`); None: `tokens` beside the runs.
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
        apply_chat_template: bool = False,
        overlong: Overlong = "drop",
        max_dropped_fraction: float = 0.1,
        batching: Batching = "padded",
        packed_sequence_size: Optional[int] = None,
        cache_dir: Optional[str] = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.seq_length, self.seed, self.apply_chat_template = seq_length, seed, apply_chat_template
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.overlong: Overlong = overlong
        self.batching: Batching = batching
        self.packed_sequence_size, self.cache_dir = packed_sequence_size, cache_dir
        self.max_dropped_fraction, self.num_workers = max_dropped_fraction, num_workers
        self.datasets: dict[Split, TokenizedDataset] = {}
        self.packs: dict[Split, prepacked.Packs] = {}
        """Of the splits that were packed ahead of time."""
        self.consumed_samples = 0
        """Of earlier jobs of this run, where `first_step` optimizer steps had been made."""
        self.first_step = 0
        self.data_sampler = NoOpSampler(
            seq_len=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )
        self._made: dict[Split, Any] = {}
        self._weights: tuple[float, ...] = ()
        self._pad_id, self._multiple, self._row_multiple, self._every, self._steps = 0, 1, 1, 1, 0

    # ---- before training: everything that can be refused is refused here ------------------------------------

    def _sources(self) -> Iterator[tuple[Split, Any]]:
        """What was given for each split; a file that has to be made is made when its turn comes."""
        given: dict[Split, Any] = {"train": self.train, "validation": self.validation}
        for split, source in given.items():
            if source is not None and source != "":
                self._made[split] = self._made.get(split) or (source() if callable(source) else source)
                yield split, self._made[split]

    def check_rows(self, *, runs: Path) -> None:
        """Read and check the rows without a tokenizer, where it will be a while before there is one.

        Raises:
            RowError: a file or row is not as it must be.
        """
        for split, source in self._sources():
            if not prepacked.is_packed(source):
                for part in sources.resolve_files(source, f"data.{split}"):
                    token_cache.check_rows(part.path, self._folder(runs))

    def tokenize(
        self, tokenizer: Any, *, kind: Kind, runs: Path, multiple: int = 1, row_multiple: int = 1, every: int = 1
    ) -> None:
        """Have everything tokenized, in `cache_dir` or beside the `runs`.

        Each sequence will take a multiple of `multiple` positions in a batch, each row of `row_multiple`; a step has a
        multiple of `every` micro-batches.

        Raises:
            RowError: see `aligner.data.token_cache.token_files`.
            ConfigError: so; or fewer examples than one global batch, or one that no pack has room for.
        """
        settings = TokenizationConfig(kind, self.seq_length, self.apply_chat_template, self.overlong)
        folder = self._folder(runs)
        for split, source in self._sources():
            if prepacked.is_packed(source):
                files, self.packs[split] = prepacked.load(Path(source), tokenizer, settings, f"data.{split}")
            else:
                parts = sources.resolve_files(source, f"data.{split}")
                self._take_weights(split, parts)
                files = token_files([part.path for part in parts], tokenizer, settings, folder, log=console.log_rank0)
            corpus = TokenizedDataset(files, mismatched_within=self.seq_length if kind == "unpaired" else None)
            for file in files:
                check_share(file.report, file.path, seq_length=self.seq_length, limit=self.max_dropped_fraction)
            self.datasets[split] = corpus
        if self.num_samples("train") < self.global_batch_size:
            noun = "packs" if "train" in self.packs else "examples"
            raise ConfigError(
                f"data.global_batch_size: {self.global_batch_size} {noun} a step, but {self._made['train']} holds only "
                f"{self.num_samples('train')} that can be used ({self.datasets['train'].report}); lower it or add data"
            )
        hf = getattr(tokenizer, "tokenizer", tokenizer)
        self._pad_id = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
        self._multiple, self._row_multiple, self._every = multiple, row_multiple, every
        for split, corpus in self.datasets.items():
            if self.batching == "packed" and split not in self.packs:
                room, field = self.cutting(split).packed_sequence_size, "data.packed_sequence_size"
                if self.packed_sequence_size and room != self.packed_sequence_size:
                    field += f" ({self.packed_sequence_size}, rounded down to a multiple of {row_multiple})"
                corpus.check_room(room, field, multiple=multiple)
        files = self.datasets["train"].files
        sizes = (len(self.packs["train"]),) if "train" in self.packs else tuple(map(len, files))
        self.order = GlobalBatchSampler(self.seed, sizes, self._weights)

    def _folder(self, runs: Path) -> Path:
        return Path(self.cache_dir).expanduser() if self.cache_dir else runs / "tokens"

    def _take_weights(self, split: Split, parts: Sequence[sources.DataFile]) -> None:
        if parts[0].weight is None:
            return
        if split == "validation":
            raise ConfigError("data.validation: has weights, but every row counts once in a validation; leave them out")
        self._weights = tuple(part.weight or 0.0 for part in parts)

    def num_samples(self, split: Split) -> int:
        """What a global batch counts: examples, or packs that were made ahead of time."""
        return len(self.packs[split]) if split in self.packs else self.datasets[split].num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; what does not fill a last global batch is left out of that epoch."""
        return self.num_samples("train") // self.global_batch_size

    def plan(self, *, max_steps: int) -> None:
        """Fix how many optimizer steps the training loader must feed."""
        self._steps = max_steps

    def fingerprint(self, split: Split) -> str:
        """Hash of the tokens and rewards of a split, in file order."""
        return self.datasets[split].fingerprint

    # ---- loaders ----------------------------------------------------------------------------------------------

    def global_batch(self, step: int) -> np.ndarray:
        """The units of an optimizer step, in order."""
        return self.order.global_batch(step, self.global_batch_size)

    def examples_in(self, step: int) -> int:
        """How many examples an optimizer step learns from."""
        if "train" not in self.packs:
            return self.global_batch_size
        return sum(len(self.packs["train"][unit]) for unit in self.global_batch(step))

    def cutting(self, split: Split) -> MicrobatchSplitter:
        """How global batches of a split are cut."""
        places, step = self.datasets[split].positions(self._multiple), math.lcm(self._multiple, self._row_multiple)
        longest = -(-self.seq_length // step) * step
        return MicrobatchSplitter(
            self.batching,
            self.micro_batch_size,
            # What rounds a row up belongs to its last sequence, and must find room as well.
            self.packed_sequence_size // self._row_multiple * self._row_multiple
            if self.packed_sequence_size
            else places.shape[1] * longest,
            tokens=self.datasets[split].packed_tokens(self._multiple),
            longest=places.max(axis=1),
            every=self._every,
            packs=self.packs.get(split),
        )

    def _loader(
        self, split: Split, units: Callable[[int], np.ndarray], steps: StepSampler, mode: str
    ) -> WrappedDataLoader:
        cutting = self.cutting(split)
        lay = functools.partial(
            collate,
            pad_id=self._pad_id,
            packed=cutting.concatenated,
            multiple=self._multiple,
            row_multiple=self._row_multiple,
        )
        return loader(
            self.datasets[split], units, steps, cutting=cutting, collate=lay, mode=mode, num_workers=self.num_workers
        )

    def train_dataloader(self) -> WrappedDataLoader:
        """All that is left of the run, in its order."""
        trainer = self.trainer
        assert trainer is not None and self._steps > 0, "plan() comes before the loader"
        self.first_step = trainer.global_step
        steps = StepSampler(self.consumed_samples // self.global_batch_size, self._steps)
        return self._loader("train", self.global_batch, steps, "train")

    def val_dataloader(self) -> WrappedDataLoader:
        """Every validation row once; copies that fill up the last micro-batches weigh nothing."""
        return self._whole("validation", np.arange(self.num_samples("validation")))

    def scoring_dataloader(self, split: Split) -> WrappedDataLoader:
        """Every row of a split once, mismatched ones after the others.

        Training rows come in the order of the first epoch: so the first global batches lie as they will in training,
        and policy and reference agree there to the last bit.
        """
        corpus, units = self.datasets[split], np.arange(self.num_samples(split))
        if split == "train":
            units = self.order.epoch(0)
        if split == "train" and self._weights:
            # A blend leaves some rows out of an epoch and brings others twice.
            every, firsts = np.unique(units, return_index=True)
            units = np.concatenate([units[np.sort(firsts)], np.setdiff1d(np.arange(corpus.num_examples), every)])
        others = np.arange(corpus.num_examples, len(corpus)) + len(self.packs.get(split, ()))
        return self._whole(split, units, others)

    def _whole(self, split: Split, *runs: np.ndarray) -> WrappedDataLoader:
        size = self.global_batch_size
        batches = [units[i : i + size] for units in runs for i in range(0, len(units), size)]
        return self._loader(split, batches.__getitem__, StepSampler(0, len(batches)), "validation")

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and of which data."""
        trainer = self.trainer
        assert trainer is not None
        steps = trainer.global_step - self.first_step
        return {"consumed_samples": self.consumed_samples + steps * self.global_batch_size}

    def identity(self) -> dict[str, Any]:
        """What is learned from, for a comparison with what a resumed run has learned from."""
        return {
            "data.train": f"{self.datasets['train'].report} ({self.fingerprint('train')[:16]})",
            "data.train.weights": list(self._weights),
            "data.train.packs": self.packs["train"].fingerprint if "train" in self.packs else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another job of this run stopped; `aligner.train.resume_settings` has found the data to be the same."""
        self.consumed_samples = int(state_dict["consumed_samples"])
