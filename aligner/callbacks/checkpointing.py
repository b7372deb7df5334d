"""When a run saves, how a checkpoint comes into its place, and which ones are kept."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from aligner.backend.device import communication_device
from aligner.callbacks import validation_loop
from aligner.checkpoint import folders
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.files import PARTIAL, fsync_dir
from aligner.losses import metrics

MONITORED = tuple(f"val/{name}" for name in metrics.LOGGED)
"""What can make a checkpoint good."""


class CheckpointCallback(nl.ModelCheckpoint):
    """NeMo's ModelCheckpoint with a rule of its own for what is kept, and nothing that names must be parsed for.

    A checkpoint is written beside its place and renamed when it is whole; `step=N` then has N steps behind it. Kept are
    the newest one, from which a run goes on, and the `save_top_k` best. Others are removed once a newer one is
    whole. The last step is saved wherever the interval falls. `trainer.strategy.ckpt_async_save=True` writes while
    training goes on.

    Args:
        every_n_train_steps: save after so many optimizer steps, counted from the start of the run.
        every_n_minutes: save when so many minutes have passed since the last time.
        monitor: what makes a checkpoint good, "val/loss" for example: it is then saved after the validation of its
            step. None: the later the better.
        mode: whether the lowest (min) or the highest (max) value is the best.
        save_top_k: how many to keep; -1 keeps all.
        save_last: keep a link `last` to the newest one.

    Raises:
        ConfigError: a number is none that makes sense.
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
    ) -> None:
        for name, value in (
            ("every_n_train_steps", every_n_train_steps),
            ("every_n_minutes", every_n_minutes),
        ):
            if value is not None and value <= 0:
                raise ConfigError(f"log.ckpt.{name}: must be more than 0, found {value}; None switches it off")
        if save_top_k < -1:
            raise ConfigError(f"log.ckpt.save_top_k: is {save_top_k}; give -1 for all, or a number to keep")
        if monitor is not None and monitor not in MONITORED:
            raise ConfigError(f"log.ckpt.monitor: {monitor!r} is not one of {', '.join(MONITORED)}, or None")
        super().__init__(
            monitor=monitor,
            mode=mode,
            save_top_k=-1,  # upstream's own rule, which is not used and knows no other number without a monitor
            save_last=False,
            every_n_train_steps=every_n_train_steps or 0,
            filename="{step}",
            save_optim_on_train_end=True,
        )
        self.every_n_steps, self.every_n_minutes, self.link_last = every_n_train_steps, every_n_minutes, save_last
        self.save_top_k = save_top_k
        self.describe: Callable[[], dict[str, Any]] = dict
        """What a checkpoint is to say of itself beside its step; set where the run is put together."""
        self._saved_at = time.monotonic()
        self._waits_for_validation, self._measured_at = False, -1
        self._removals: list[threading.Thread] = []
        self._needed = 0

    def check(self, *, val_check_interval: int, validates: bool) -> None:
        """Compare what is monitored with when it is measured.

        Raises:
            ConfigError: checkpoints would have no value.
        """
        if self.monitor is None:
            return
        if not validates:
            raise ConfigError(f"log.ckpt.monitor: is {self.monitor}, but there is no data.validation to measure it on")
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

    # ---- when -------------------------------------------------------------------------------------------------

    @property
    def step_saved(self) -> int:
        """The step that was saved last in this job; 0 if none was."""
        return self._last_global_step_saved

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # The step that the run goes on from is there.
        self._last_global_step_saved = trainer.global_step
        self._saved_at = time.monotonic()
        self._needed = _estimate(trainer)
        if trainer.is_global_zero:
            written = [path for path in folders.folders(Path(str(self.dirpath)).parent) if path.suffix != PARTIAL]
            self._needed = max(map(folders.disk_usage, written), default=self._needed)
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
        # The ranks' clocks differ; the first one's counts.
        return trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured_at = trainer.global_step
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            raise ConfigError(f"log.ckpt.monitor: {self.monitor} is not measured with this loss; use val/loss")
        if self._waits_for_validation:
            self._waits_for_validation = False
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: steps and minutes say when."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self.save(trainer)
        self.wait(trainer)

    # ---- how --------------------------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of the step that was just made; every rank must call.

        Raises:
            CheckpointError: the disk has no room for it; nothing was written.
        """
        # An earlier one that is still being written would be taken for the newest.
        self.wait(trainer)
        self._check_room(trainer)
        assert self.dirpath is not None
        self._save_checkpoint(trainer, str(Path(self.dirpath) / f"step={trainer.global_step}{PARTIAL}"))
        self._saved_at = time.monotonic()

    def wait(self, trainer: pl.Trainer) -> None:
        """Until everything that is being written or removed is."""
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, AsyncFinalizableCheckpointIO):
            writer.maybe_finalize_save_checkpoint(blocking=True)
        for removal in self._removals:
            removal.join()
        self._removals.clear()

    def _get_finalize_save_checkpoint_callback(self, trainer: Any, filepath: str, global_step: int) -> Any:
        """What is done when all ranks have written; while training goes on, if they write beside it."""
        upstream = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        measured = None
        if self.monitor is not None and self._measured_at == global_step:  # or it is of an earlier step
            measured = trainer.callback_metrics[self.monitor]
        said = {
            "format": folders.FORMAT,
            "step": global_step,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "monitor": self.monitor,
            "value": None if measured is None else float(measured),
            **self.describe(),
        }

        def finish() -> None:
            upstream()
            partial, problem = ckpt_to_dir(filepath), None
            if trainer.is_global_zero:
                problem = folders.find_corruption(partial)
                if problem is None:
                    try:
                        self._put_in_place(partial, said)
                    except (OSError, TypeError) as error:
                        problem = f"it could not be put in its place ({error})"
            # The others wait here; they must not be left waiting when it went wrong.
            problem = trainer.strategy.broadcast(problem)
            if problem is not None:
                # The one before it is still there.
                raise CheckpointError(f"log.log_dir: {partial} was written, and {problem}; look at the disk of it")

        return finish

    def _put_in_place(self, partial: Path, said: dict[str, Any]) -> None:
        (partial / folders.METADATA_FILE).write_text(json.dumps(said, indent=2) + "\n")
        target = partial.with_suffix("")
        if target.exists():
            # A damaged one of the same step, which was passed over.
            self._remove(target)
        os.replace(partial, target)
        fsync_dir(target.parent)
        self._needed = folders.disk_usage(target)
        self.best_model_path = self.last_model_path = str(target)
        if self.link_last:
            link = target.with_name(f"last{PARTIAL}")
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            os.replace(link, target.with_name("last"))
        self._prune(target.parent)

    def _prune(self, folder: Path) -> None:
        if self.save_top_k == -1:
            return
        found: list[tuple[int, float | None, Path]] = []
        for path in folders.folders(folder.parent):
            if not folders.is_unfinished(path) and folders.find_corruption(path) is None:
                try:
                    said = folders.metadata(path)
                except CheckpointError:
                    continue  # as one with a fault: not ours to remove, and nothing may go for its sake
                comparable = said.get("monitor") == self.monitor
                found.append((said["step"], said.get("value") if comparable else None, path))
        stay = kept([(step, value) for step, value, _ in found], self.save_top_k, self.mode, self.monitor is not None)
        for step, _, path in found:
            if step not in stay:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Take a checkpoint away: at once by name, its files while training goes on."""
        doomed = path.with_name(f"{path.name}.{time.time_ns()}{PARTIAL}")
        os.replace(path, doomed)
        removal = threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True})
        removal.start()
        self._removals.append(removal)

    # ---- room -------------------------------------------------------------------------------------------------

    def _check_room(self, trainer: pl.Trainer) -> None:
        """See that the disk has room for one more checkpoint.

        Raises:
            CheckpointError: it has not; on all ranks.
        """
        assert self.dirpath is not None
        lacking: tuple[int, int] | None = None
        if trainer.is_global_zero:
            folder = Path(self.dirpath)
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

    # ---- what upstream would do of itself ---------------------------------------------------------------------

    def nemo_topk_check_previous_run(self) -> None:
        """Nothing: upstream looks for the monitored value in the names of folders."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: what is kept is decided by what the checkpoints on the disk say of themselves."""

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        super().setup(trainer, *args, **kwargs)
        if trainer.is_global_zero:
            assert self.dirpath is not None
            for left in Path(self.dirpath).glob(f"*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        trainer.strategy.barrier()


def kept(found: Sequence[tuple[int, Union[float, None]]], top_k: int, mode: str, monitored: bool) -> set[int]:
    """Which steps stay, of (step, value): the newest, and the `top_k` best or, if not monitored, newest."""
    steps = sorted(step for step, _ in found)
    if top_k == -1:
        return set(steps)
    if not monitored:
        return set(steps[-max(1, top_k) :])
    measured = sorted((value if mode == "min" else -value, -step) for step, value in found if value is not None)
    return {steps[-1], *(-step for _, step in measured[:top_k])}


def _estimate(trainer: Any) -> int:
    """Bytes of a first checkpoint, from the weights: with two moments, and a float32 copy of half-precision ones.

    Weights that ranks share are counted once for each tensor-parallel rank; a reference's copies are not counted.
    """
    from megatron.core import parallel_state

    local, first = 0, parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_with_experts = parallel_state.get_expert_data_parallel_rank() == 0
    # Where some weights are frozen, they are those of a base that is not saved.
    for parameter in (p for p in trainer.strategy.megatron_parallel.parameters() if p.requires_grad):
        # Megatron's mark on the weights of experts, which other ranks share than share the rest.
        if first if getattr(parameter, "allreduce", True) else first_with_experts:
            width = parameter.element_size()
            local += parameter.numel() * (width + 8 + (4 if width < 4 else 0))
    total = torch.tensor(float(local), device=communication_device())
    torch.distributed.all_reduce(total)
    return int(total)
