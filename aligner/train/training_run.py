"""One run, from its arguments to NeMo's `trainer.fit`: read `TrainingRun.__call__`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.backend import distributed, kernels
from aligner.callbacks import validation_loop
from aligner.callbacks.preemption import Preempted
from aligner.checkpoint import folders
from aligner.checkpoint.disk_errors import translate_io_errors
from aligner.common import process_pool, run_folder
from aligner.common.console import close_log_files, install_excepthook, log_rank0
from aligner.common.errors import CheckpointError, ConfigError
from aligner.data.chat_template import date_of
from aligner.model import parallelism
from aligner.train import config_checks, provenance, resume_settings, starting_point, summary, trainer_setup, wandb_run
from aligner.train.arguments import RunArguments
from aligner.train.run_lock import lock_run
from aligner.train.starting_point import StartingPoint


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that the caller of a run passes in."""

    on_wandb_start: Callable[[Any, Any], None] = _nothing
    """Called once for a fresh run that logs to W&B, with Lightning's logger and the training files."""
    on_end: Callable[[Path], Path | None] = _nothing
    """Called on rank 0 with the run's folder, however the run ended; returns an HTML page for W&B, if it made one."""


class TrainingRun:
    """Carries out the arguments of `aligner.align`."""

    def __init__(self, arguments: RunArguments, hooks: Hooks) -> None:
        self.arguments, self.hooks = arguments, hooks
        self.start = StartingPoint(resumed=None, initial=None)
        self.settings: resume_settings.Settings = {}
        self.max_steps = 0

    def __call__(self) -> Path:
        """Run and return the run's folder.

        Raises:
            Preempted: the job saved and is to be run again.
        """
        began, arguments = time.monotonic(), self.arguments
        install_excepthook()
        config_checks.check_arguments(arguments)
        config_checks.check_world_size(arguments)
        config_checks.check_parallelism(arguments)
        config_checks.check_hardware(arguments)
        if arguments.logger.wandb is not None and arguments.trainer.is_global_zero:
            wandb_run.check(arguments.logger.wandb)
        with contextlib.ExitStack() as held:
            held.enter_context(distributed.preserved_environment())
            held.enter_context(translate_io_errors(arguments.folder))
            # A folder that exists is claimed before it is looked at; another one is made when nothing is refused.
            existed = distributed.of_rank_zero(lambda: self._claim(held, arguments.folder.exists()))
            self._prepare_data_and_start()
            parallelism.check(arguments.strategy.parallelism, arguments.model.config, ranks=arguments.num_ranks)
            if self._is_complete():
                return arguments.folder
            if not existed:
                distributed.of_rank_zero(lambda: self._claim(held, True))
            self._compare_settings()
            preemption = trainer_setup.add_callbacks(arguments, self.start, self.settings, began=began)
            trainer_setup.choose_kernels(arguments)
            trainer_setup.connect(arguments)
            self._record_start()
            self._fit(preemption)
        return arguments.folder

    # ---- before training --------------------------------------------------------------------------------------

    def _prepare_data_and_start(self) -> None:
        """Refuse what can be refused before another stage or an import costs its time.

        If the tokenizer comes with the checkpoint, that is at least the rows.
        """
        data, model = self.arguments.data, self.arguments.model
        # The day that the chat template writes.
        data.date = data.date or starting_point.recorded(self.arguments, "data.date") or None
        if model.tokenizer is None:
            data.check_rows(runs=self.arguments.runs)
            self.start = starting_point.find(self.arguments)
            self._tokenize()
            self._plan_steps()
        else:
            self._tokenize()
            self._plan_steps()
            self.start = starting_point.find(self.arguments)
        if self.start.checkpoint is not None:
            data.check_vocabulary(model.tokenizer, model.config.vocab_size)

    def _tokenize(self) -> None:
        arguments = self.arguments
        starting_point.set_tokenizer(arguments, self.start)
        data, tokenizer = arguments.data, arguments.model.tokenizer
        if data.date is None and date_of(tokenizer, None):
            data.date = distributed.of_rank_zero(lambda: date_of(tokenizer, None))
        multiples = parallelism.multiples(arguments.strategy.parallelism)
        data.tokenize(tokenizer, kind=arguments.objective.kind, runs=arguments.runs, **multiples)

    def _plan_steps(self) -> None:
        """Number of optimizer steps of the whole run; validation by steps."""
        arguments, trainer, per_epoch = self.arguments, self.arguments.trainer, self.arguments.data.steps_per_epoch
        self.max_steps = config_checks.num_steps(arguments, per_epoch)
        if self.max_steps < 1:
            raise ConfigError("trainer.max_steps: set it or trainer.max_epochs; neither says when to stop")
        arguments.data.plan(max_steps=self.max_steps)
        recorded = starting_point.recorded(arguments, "optim.lr_scheduler.warmup_steps")
        config_checks.set_warmup(arguments, self.max_steps, recorded)
        long_warmup = config_checks.long_warmup(arguments, self.max_steps)
        if long_warmup:
            log_rank0(long_warmup)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_interval = max(1, round(trainer.val_check_interval * per_epoch))
        trainer.check_val_every_n_epoch = None
        # The starting policy is validated, too, but after its reference is prepared.
        trainer.num_sanity_val_steps = 0
        validates = "validation" in arguments.data.datasets
        if not validates:
            trainer.limit_val_batches = 0
        validation_loop.replace_loop(trainer, max_steps=self.max_steps)
        interval = int(trainer.val_check_interval or 0)
        sets = arguments.data.validation_sets
        arguments.checkpoint_callback.check(val_check_interval=interval, validates=validates, sets=sets)

    def _is_complete(self) -> bool:
        done = folders.step_of(self.start.resumed) if self.start.resumed else 0
        if done < self.max_steps:
            return False
        # Otherwise a stage with changed data or loss would count as complete.
        self._compare_settings()
        folder = self.arguments.folder
        if not distributed.of_rank_zero(lambda: self._has_last_validation(folder)):
            log_rank0(f"{folder} has made all {done} steps; a kill took its last validation, which is made now")
            return False
        if self.arguments.trainer.is_global_zero:
            if run_folder.ending(folder) != "success":  # killed between its last checkpoint and its end
                provenance.end(folder, "success", None)
            if not (folder / run_folder.PAGE).exists():
                self.hooks.on_end(folder)
            print(
                f"{folder} has already made {done} of {self.max_steps} steps; raise trainer.max_steps to go on, or "
                "choose another log.name to start anew"
            )
            print(summary.final_table(folder), flush=True)
        return True

    def _has_last_validation(self, folder: Path) -> bool:
        """Return whether a complete run has the validation that follows its last step."""
        rows = run_folder.read_metrics(folder / run_folder.METRICS)
        made = folders.step_of(self.start.resumed) if self.start.resumed else self.max_steps
        validates = "validation" in self.arguments.data.datasets and self.arguments.trainer.limit_val_batches != 0
        if not validates or made != self.max_steps:  # a run that was made shorter has no validation due where it is
            return True
        return any(row["step"] == made and any(name.startswith("val/") for name in row) for row in rows)

    def _claim(self, held: contextlib.ExitStack, claims: bool) -> bool:
        """Lock the run's folder, if it is to be, and look whether another job has changed it meanwhile."""
        resume, folder = self.arguments.resume, self.arguments.folder
        if claims:
            known = resume is not None and self.max_steps > 0
            held.enter_context(lock_run(folder))
            if known and resume is not None and resume.look(folder) != self.start.resumed:
                raise CheckpointError(f"log.name: another job has just been at work in {folder}; run this one again")
            run_folder.check_own(folder)
        return claims

    def _compare_settings(self) -> None:
        """Refuse to resume a run under other settings than it began with."""
        self.settings = resume_settings.collect(self.arguments)
        resumed, resume = self.start.resumed, self.arguments.resume
        if resumed is None:
            return
        saved = folders.metadata(resumed)
        before = saved.get("settings")
        if not isinstance(before, dict):
            raise CheckpointError(
                f"{resumed}: has no {folders.METADATA_FILE} with the settings that it was made under, so they cannot "
                "be compared; put it back, or begin another run from these weights: another log.name, and "
                f"resume.restore_config.path={resumed}"
            )
        resume_settings.check_experts(saved["layout"], self.arguments, resumed)
        assert resume is not None
        for name, (old, new) in resume_settings.compare(before, self.settings, allowed=resume.allow_changes).items():
            log_rank0(f"{name}: was {old!r}, is {new!r} from here on, as resume.allow_changes says")

    def _record_start(self) -> None:
        arguments, start = self.arguments, self.start
        if arguments.trainer.is_global_zero:
            recipe = provenance.write(arguments, start, self.settings)
            if arguments.logger.wandb is not None:
                wandb_run.describe(arguments.logger.wandb, recipe)
                if start.resumed is None:
                    self.hooks.on_wandb_start(arguments.logger.wandb, arguments.data.train)
        if start.resumed is not None:
            log_rank0(f"resuming from step {folders.step_of(start.resumed)}: {start.resumed}")
            self._log_repeated(folders.step_of(start.resumed))
        elif start.initial is not None:
            log_rank0(f"starting from {start.initial}")
        summary.log_data_summary(arguments)

    def _log_repeated(self, step: int) -> None:
        """Log that steps after the checkpoint are made again, whose metrics are then written anew."""
        rows = run_folder.read_metrics(self.arguments.folder / run_folder.METRICS)
        last = int(max((row["step"] for row in rows if "train/loss" in row), default=-1))
        if last >= step:
            log_rank0(f"{run_folder.METRICS} goes to step {last}; steps {step} to {last} are made again")

    # ---- training ---------------------------------------------------------------------------------------------

    def _fit(self, preemption: Any) -> None:
        arguments, trainer = self.arguments, self.arguments.trainer
        arguments.strategy.store = distributed.fresh_store(arguments.strategy.cluster_environment)
        status = "failed"
        try:
            with process_pool.hidden_main_module(), preemption.listening():
                trainer.fit(arguments.model, arguments.data)
                # The next stage reads this checkpoint, and rank 0 may still be removing its 'unfinished' marker.
                trainer.strategy.barrier()
            status = "success"
            if trainer.is_global_zero:
                print(summary.final_table(arguments.folder), flush=True)
        except Preempted as stopped:
            status = "preempted"
            if stopped.by_user:
                log_rank0("interrupted; run the same command again to resume")
                raise KeyboardInterrupt from None
            log_rank0(f"{stopped.reason}: exiting with code {stopped.code}; run the same command again to resume")
            raise
        finally:
            self._teardown(status)

    def _teardown(self, status: str) -> None:
        """Restore the process for another run in it."""
        arguments = self.arguments
        for logger in arguments.trainer.loggers:
            logger.finalize(status)
        if arguments.trainer.is_global_zero:
            provenance.end(arguments.folder, status, sys.exc_info()[1])
            wandb_run.finish(arguments.logger.wandb, status, page=self.hooks.on_end(arguments.folder))
        if arguments.deterministic:
            kernels.switch_off()
        arguments.trainer._teardown()
        for callback in arguments.trainer.callbacks:  # type: ignore[attr-defined]
            # Lightning's; NeMo's callback for the whole process would keep the model alive by them.
            for name in ("log", "log_dict"):
                vars(callback).pop(name, None)
        distributed.destroy_distributed()
        close_log_files(arguments.folder)
