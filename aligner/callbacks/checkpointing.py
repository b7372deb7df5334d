"""Callback that saves checkpoints: the schedule, the atomic write, and the checkpoints to keep."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from fiddle.experimental import serialization
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import CONTEXT_PATH, WEIGHTS_PATH, ckpt_to_dir
from nemo.lightning.io.pl import TrainerContext
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from aligner.backend.device import communication_device
from aligner.callbacks import validation_loop
from aligner.checkpoint import folders
from aligner.checkpoint.kept import KeptCheckpoints
from aligner.checkpoint.safety import integrity
from aligner.checkpoint.source_files import SourceFiles
from aligner.common import yaml_values
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.files import PARTIAL
from aligner.losses import metrics

MONITORED = tuple(f"val/{name}" for name in metrics.LOGGED)
"""Metrics that can rank checkpoints."""


def _of_all_sets(monitor: str) -> str:
    """Return the metric over all validation sets, of which `monitor` may be that of one."""
    return "val/" + monitor.rpartition("/")[2] if monitor.startswith("val/") else monitor


class CheckpointCallback(nl.ModelCheckpoint):
    """NeMo's ModelCheckpoint with another rule for the checkpoints to keep; it parses no folder names.

    A checkpoint is written to a temporary folder and renamed when it is complete; `step=N` follows N optimizer steps.
    The newest one, from which a run resumes, and the `save_top_k` best are kept. Others are removed once a newer one is
    complete. The last step is always saved. `trainer.strategy.ckpt_async_save=True` writes during training.

    Args:
        every_n_train_steps: optimizer steps between checkpoints, counted from the start of the run.
        every_n_minutes: minutes between checkpoints.
        monitor: metric that ranks checkpoints, as "val/loss", or "val/NAME/loss" of a named validation set. A
            checkpoint is then saved after the validation of its step. None: the newest is best.
        mode: whether the lowest (min) or the highest (max) value is best.
        save_top_k: number of best checkpoints to keep; -1 keeps all.
        save_last: keep a link `last` to the newest checkpoint.
        hash_files: write hashes of all files, with which a damaged one is found when it is loaded.

    Raises:
        ConfigError: a number is out of range, or `monitor` is not a metric.
    """

    def __init__(
        self,
        *,
        every_n_train_steps: Optional[int] = None,
        every_n_minutes: Optional[float] = None,
        monitor: Optional[str] = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = False,
        hash_files: bool = True,
    ) -> None:
        for name, value in (
            ("every_n_train_steps", every_n_train_steps),
            ("every_n_minutes", every_n_minutes),
        ):
            if value is not None and value <= 0:
                raise ConfigError(f"log.ckpt.{name}: must be more than 0, found {value}; None switches it off")
        if save_top_k < -1:
            raise ConfigError(f"log.ckpt.save_top_k: is {save_top_k}; give -1 for all, or a number to keep")
        if monitor is not None and _of_all_sets(monitor) not in MONITORED:
            raise ConfigError(
                f"log.ckpt.monitor: {monitor!r} is not one of {', '.join(MONITORED)}, with the name of a validation "
                "set after val/ if there are several, or None"
            )
        super().__init__(
            monitor=monitor,
            mode=mode,
            save_top_k=-1,  # NeMo's rule, which is not used; without a monitor it accepts no other number
            save_last=False,
            every_n_train_steps=every_n_train_steps or 0,
            filename="{step}",
            save_optim_on_train_end=True,
            always_save_context=False,  # NeMo's leaves an empty file where something of the recipe cannot be written
            save_context_on_train_end=False,
        )
        self.every_n_steps, self.every_n_minutes, self.link_last = every_n_train_steps, every_n_minutes, save_last
        self.save_top_k, self.hash_files = save_top_k, hash_files
        self.describe: Callable[[], dict[str, Any]] = dict
        """Returns checkpoint metadata beside the step; `aligner.train.trainer_setup` sets it."""
        self.source_files = SourceFiles(None)
        """Files that belong beside the weights; `aligner.train.trainer_setup` sets them."""
        self._saved_at = time.monotonic()
        self._waits_for_validation, self._validated_step = False, -1
        self._needed = 0

    def check(self, *, val_check_interval: int, validates: bool, sets: Collection[str] = ()) -> None:
        """Compare `monitor` with the validation schedule.

        Raises:
            ConfigError: checkpoints would have no value of `monitor`.
        """
        if self.monitor is None:
            return
        if not validates:
            raise ConfigError(f"log.ckpt.monitor: is {self.monitor}, but there is no data.validation to measure it on")
        name = self.monitor.removeprefix("val/").rpartition("/")[0]
        if name and name not in sets:
            there_are = f"are {', '.join(sets)}" if sets else "is one without a name, which val/loss measures"
            raise ConfigError(f"log.ckpt.monitor: {self.monitor}, but of validation sets there {there_are}")
        if self.every_n_minutes is not None:
            raise ConfigError(
                f"log.ckpt.every_n_minutes: {self.every_n_minutes} is no multiple of validations, and log.ckpt.monitor "
                f"is {self.monitor}; use every_n_train_steps"
            )
        if self.every_n_steps and self.every_n_steps % val_check_interval:
            raise ConfigError(
                f"log.ckpt.every_n_train_steps: {self.every_n_steps} is no multiple of trainer.val_check_interval "
                f"({val_check_interval}), so a checkpoint would have no {self.monitor} of its own; use a multiple, or "
                "log.ckpt.monitor=None"
            )

    # ---- schedule ---------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        """The folder of checkpoints."""
        assert self.dirpath is not None
        return Path(self.dirpath)

    @cached_property
    def _kept(self) -> KeptCheckpoints:
        return KeptCheckpoints(self._folder.parent)

    @property
    def step_saved(self) -> int:
        """The newest saved step, also by an earlier job; 0 if there is none."""
        return self._last_global_step_saved

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # The checkpoint that the run resumes from exists.
        self._last_global_step_saved = trainer.global_step
        self._saved_at = time.monotonic()
        self._needed = _estimate_bytes(trainer)
        if trainer.is_global_zero:
            existing = [path for path in folders.folders(self._folder.parent) if path.suffix != PARTIAL]
            self._needed = max(map(folders.disk_usage, existing), default=self._needed)
        self._check_room(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._should_skip_saving_checkpoint(trainer) or not self._is_due(trainer):
            return
        self._waits_for_validation = self.monitor is not None and validation_loop.is_due(trainer)
        if not self._waits_for_validation:
            self.save(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None:
            return False
        # Clocks of ranks differ; rank 0 decides.
        return trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_step = trainer.global_step
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            raise ConfigError(f"log.ckpt.monitor: {self.monitor} is not measured with this loss; use val/loss")
        if self._waits_for_validation:
            self._waits_for_validation = False
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: steps and minutes are the schedule."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self.save(trainer)
        self.wait(trainer)

    # ---- writing ----------------------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of the current step; every rank must call.

        Raises:
            CheckpointError: the disk has too little space; nothing was written.
        """
        # An earlier checkpoint that is still being written would count as the newest.
        self.wait(trainer)
        self._check_room(trainer)
        partial = self._folder / f"step={trainer.global_step}{PARTIAL}"
        problem = trainer.strategy.broadcast(self._claim(partial) if trainer.is_global_zero else None)
        if problem is not None:
            raise CheckpointError(f"log.log_dir: {problem}")
        self._save_checkpoint(trainer, str(partial))
        self._saved_at = time.monotonic()

    def _claim(self, partial: Path) -> str | None:
        """Record the name of a checkpoint that is to be written; return why it cannot be."""
        try:
            in_the_way = self._kept.claim(partial)
        except OSError as error:  # the other ranks wait
            return f"{partial} cannot be begun ({error})"
        return f"{in_the_way} is in the way, and this run did not write it; move it" if in_the_way else None

    def wait(self, trainer: pl.Trainer) -> None:
        """Wait until all writes and removals are complete."""
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, AsyncFinalizableCheckpointIO):
            writer.maybe_finalize_save_checkpoint(blocking=True)
        self._kept.wait()

    def _get_finalize_save_checkpoint_callback(self, trainer: Any, filepath: str, global_step: int) -> Any:
        """Return the function to call when all ranks have written; during training, if they write asynchronously."""
        finalize_upstream = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        value = None
        if self.monitor is not None and self._validated_step == global_step:  # otherwise the value is of another step
            value = trainer.callback_metrics[self.monitor]
        metadata = {
            "format": folders.FORMAT,
            "step": global_step,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "monitor": self.monitor,
            "value": None if value is None else float(value),
            **self.describe(),
        }

        def finish() -> None:
            finalize_upstream()
            partial, problem = ckpt_to_dir(filepath), None
            hashes = _hash_weights(trainer, partial) if self.hash_files else {}
            if trainer.is_global_zero:
                try:
                    problem = _write_context(trainer, partial) or folders.find_corruption(partial)
                    if problem is None:
                        self._put_in_place(partial, metadata, hashes)
                except Exception as error:
                    problem = f"it could not be put in its place ({error})"
            # The other ranks wait here, also when rank 0 failed.
            problem = trainer.strategy.broadcast(problem)
            if problem is not None:
                # The previous checkpoint still exists.
                raise CheckpointError(f"log.log_dir: {partial} was written, and {problem}; look at the disk of it")

        return finish

    def _put_in_place(self, partial: Path, metadata: dict[str, Any], hashes: integrity.Hashes) -> None:
        self.source_files.write(partial)
        (partial / folders.METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        # All of it is on the disk before an older one goes.
        integrity.write(partial, hashes) if self.hash_files else integrity.flush(partial)
        target = self._kept.put_in_place(partial)
        self._needed = folders.disk_usage(target)
        self.best_model_path = self.last_model_path = str(target)
        if self.link_last:
            self._kept.link_last(target)
        self._kept.prune(top_k=self.save_top_k, monitor=self.monitor, mode=self.mode)

    # ---- disk space -------------------------------------------------------------------------------------------

    def _check_room(self, trainer: pl.Trainer) -> None:
        """Check that the disk has space for one more checkpoint.

        Raises:
            CheckpointError: the disk has too little space; raised on all ranks.
        """
        lacking: tuple[int, int] | None = None
        if trainer.is_global_zero:
            folder = self._folder
            free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
            lacking = (free, self._needed) if free < self._needed else None
        lacking = trainer.strategy.broadcast(lacking)
        if lacking is not None:
            free, needed = lacking
            raise CheckpointError(
                f"log.log_dir: the disk of {self.dirpath} is full: {free / 1e9:.2f} GB are left, and a checkpoint "
                f"takes about {needed / 1e9:.2f} GB, which it needs before an older one can go. Nothing was written; "
                "free some room and run the same command again"
            )

    # ---- NeMo's behavior that is switched off -----------------------------------------------------------------

    def nemo_topk_check_previous_run(self) -> None:
        """Do nothing: NeMo looks for the monitored value in folder names."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the metadata on disk determines the checkpoints to keep."""

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        super().setup(trainer, *args, **kwargs)
        if trainer.is_global_zero:
            with contextlib.suppress(OSError):  # the other ranks wait
                self._kept.clear_partial()
        trainer.strategy.barrier()


def _write_context(trainer: Any, checkpoint: Path) -> str | None:
    """Write the configs of model, trainer and data beside the weights; return what is wrong, if something is."""
    folder = checkpoint / CONTEXT_PATH
    context: Any = TrainerContext.from_trainer(trainer)
    try:
        context.io_dump(folder, yaml_attrs=["model"])
        return None
    except Exception:  # a path, an object, a number of NumPy in the recipe
        shutil.rmtree(folder, ignore_errors=True)
        # What NeMo has registered, it writes into a file beside.
        registered = serialization.find_node_traverser
        context.__io__, _ = yaml_values.representable(context.__io__, lambda value: registered(type(value)) is not None)
    try:
        context.io_dump(folder, yaml_attrs=["model"])
    except Exception as error:
        return f"its configs cannot be written ({type(error).__name__}: {error})"
    return None


def _hash_weights(trainer: Any, checkpoint: Path) -> integrity.Hashes:
    """Return on rank 0 the hashes of the weights' files; each rank reads those that it wrote, which it has at hand."""
    if trainer.world_size == 1:
        return {}
    own = (checkpoint / WEIGHTS_PATH).glob(f"__{trainer.global_rank}_*.distcp")
    hashes: integrity.Hashes = {}
    with contextlib.suppress(OSError):  # rank 0 reads what is missing
        hashes = integrity.compute(checkpoint, [f"{WEIGHTS_PATH}/{path.name}" for path in own])
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.gather_object(hashes, gathered if trainer.is_global_zero else None)
    return {name: value for part in gathered if part for name, value in part.items()}


def _estimate_bytes(trainer: Any) -> int:
    """Estimate the bytes of a first checkpoint: weights, two moments, a float32 copy of half-precision weights.

    Weights that ranks share are counted once per tensor-parallel rank; a reference's copies are not counted.
    """
    from megatron.core import parallel_state

    local, first = 0, parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_with_experts = parallel_state.get_expert_data_parallel_rank() == 0
    # Frozen weights belong to a base model that is not saved.
    for parameter in (p for p in trainer.strategy.megatron_parallel.parameters() if p.requires_grad):
        # Megatron's flag of expert weights, which other ranks share than the ranks that share the rest.
        if first if getattr(parameter, "allreduce", True) else first_with_experts:
            width = parameter.element_size()
            local += parameter.numel() * (width + 8 + (4 if width < 4 else 0))
    total = torch.tensor(float(local), device=communication_device())
    torch.distributed.all_reduce(total)
    return int(total)
