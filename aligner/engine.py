"""One run: from checked arguments to NeMo's `trainer.fit`, in the order in which it happens."""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from nemo.lightning import MegatronOptimizerModule, MegatronStrategy, NeMoLogger, Trainer
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.pytorch.callbacks import PEFT, ModelTransform

from aligner import (
    adapters,
    architecture,
    checkpoints,
    checks,
    kernels,
    layout,
    parallel,
    process,
    provenance,
    reporting,
    schedule,
    settings,
    wandb_run,
)
from aligner.claim import LOCK, claimed
from aligner.console import plain_errors, say
from aligner.data import AlignDataModule
from aligner.errors import CheckpointError, ConfigError
from aligner.health import Health
from aligner.limits import Limits, Preempted, Preemption
from aligner.lookahead import Lookahead
from aligner.objective import Loss, Objective
from aligner.policy import attach
from aligner.progress import Progress
from aligner.reference import AdaptersOff, Reference
from aligner.report import summary, tell
from aligner.saving import Checkpoint
from aligner.watchdog import Watchdog
from aligner.watching import Watch


@dataclass(kw_only=True)
class Run:
    """What `aligner.api.align` was given; calling it does the run and returns its folder."""

    model: Any
    data: AlignDataModule
    trainer: Trainer
    loss: Loss
    preference_weight: float
    sft_weight: float
    reference: Reference | None
    peft: PEFT | None
    log: NeMoLogger | None
    optim: MegatronOptimizerModule | None
    resume: checkpoints.Resume | None
    limits: Limits | None = None

    def __call__(self) -> Path:
        """Do the run.

        Raises:
            Preempted: it was told to end, and is to be run again.
        """
        began = time.monotonic()
        plain_errors()
        checks.arguments(self)
        checks.started(self)
        checks.layout(self)
        checks.machine(self)
        with process.kept_environment(), process.clear_errors(self.folder):
            return self._run(began)

    def _run(self, began: float) -> Path:
        # All that can be refused is, before another stage or an import costs its time: if the tokenizer comes with the
        # checkpoint, at least the rows.
        start_first = self.model.tokenizer is None
        if start_first:
            self.data.read(runs=self.runs)
            self._find_start()
        self._tokenize()
        max_steps = self._plan()
        if not start_first:
            self._find_start()
        layout.check(
            self.strategy.parallelism, self.model.config, ranks=self.trainer.num_nodes * self.trainer.num_devices
        )
        if self._finished(max_steps):
            return self.folder
        with claimed(self.folder):
            return self._fit(began)

    def _fit(self, began: float) -> Path:
        if self.resume and self.resume.find(self.folder) != self._continued:
            raise CheckpointError(f"log.name: another job has just been at work in {self.folder}; run this one again")
        self._compare()
        preemption = self._connect(began)
        self.strategy.store = process.fresh_store(self.strategy.cluster_environment)
        status = "failed"
        try:
            with parallel.thin_main(), preemption.listening():
                self.trainer.fit(self.model, self.data)
                # A next stage looks for this one's checkpoint: rank 0 may still be clearing its marker away.
                self.trainer.strategy.barrier()
            status = "success"
            if self.trainer.is_global_zero:
                print(summary(self.folder), flush=True)
        except Preempted as stopped:
            status = "preempted"
            say(f"{stopped.reason}: ends with exit code {stopped.code}; run the same command again to go on")
            raise
        finally:
            self._teardown(status)
        return self.folder

    # ---- where ------------------------------------------------------------------------------------------------

    @cached_property
    def logger(self) -> NeMoLogger:
        return self.log or NeMoLogger()

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return Path(self.logger.log_dir or Path.cwd() / "nemo_experiments").expanduser()

    @property
    def folder(self) -> Path:
        """The folder of this run."""
        return self.runs / self.logger.name

    @cached_property
    def objective(self) -> Objective:
        """What is minimised; read after the arguments were checked."""
        return Objective(loss=self.loss, preference_weight=self.preference_weight, sft_weight=self.sft_weight)

    @property
    def _deterministic(self) -> Any:
        # torch's own flag may be left of another run.
        return getattr(self.trainer.__io__, "deterministic", None)

    @property
    def strategy(self) -> MegatronStrategy:
        return self.trainer.strategy  # type: ignore[return-value]

    # ---- what it starts from and how long it goes -----------------------------------------------------------

    def _find_start(self) -> None:
        """Where the run goes on, or what it starts from; the model is fitted to it."""
        resume = self.resume
        self._continued = (resume or checkpoints.Resume(resume_if_exists=False)).find(self.folder)
        self._start = resume.resolve(cache=self.runs / "models") if resume and not self._continued else None
        source = self._continued or self._start
        adapters.check(self.peft, source, continued=self._continued is not None)
        if source is None:
            return
        assert resume is not None
        if resume.adapters and self.objective.needs_reference and isinstance(self.reference, AdaptersOff):
            raise ConfigError(
                f"reference: AdaptersOff, but the adapters of {resume.adapters} are continued, so that the policy "
                "would be held to the bare base from before they were trained; use run.Config(Cached), or Frozen, "
                "which copies adapters alone"
            )
        if self._continued is not None:
            resume.imported = bool(checkpoints.record(self._continued).get("imported"))
        architecture.fit(self.model, source, adopt=resume.imported or self._continued is not None)
        size = self.strategy.parallelism.tensor_model_parallel_size
        architecture.keep_vocabulary(self.model, source, tensor_model_parallel_size=size)

    def _tokenize(self) -> None:
        if self.model.tokenizer is None:
            source = self._continued or self._start
            if source is None:
                raise ConfigError(
                    "model.tokenizer: is None and there is no checkpoint to take one from; set it, or "
                    "resume.restore_config.path"
                )
            self.model.tokenizer = checkpoints.tokenizer_of(source, kept_in=self.folder if self._continued else None)
            # For the run's own checkpoints, which carry what the model was made of.
            self.model.__io__.tokenizer = self.model.tokenizer.__io__
        divided = layout.multiples(self.strategy.parallelism)
        self.data.prepare(self.model.tokenizer, kind=self.objective.kind, runs=self.runs, **divided)

    def _plan(self) -> int:
        """How many optimizer steps the whole run has; validation by steps."""
        trainer, per_epoch = self.trainer, self.data.steps_per_epoch
        limits = [trainer.max_steps, (trainer.max_epochs or -1) * per_epoch]
        if max(limits) < 1:
            raise ConfigError("trainer.max_steps: set it or trainer.max_epochs; neither says when to stop")
        steps = min(limit for limit in limits if limit > 0)
        self.data.plan(max_steps=steps)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_interval = max(1, round(trainer.val_check_interval * per_epoch))
        trainer.check_val_every_n_epoch = None
        # The starting policy is validated, too, but after its reference is known.
        trainer.num_sanity_val_steps = 0
        if "validation" not in self.data.examples:
            trainer.limit_val_batches = 0
        schedule.install(trainer, max_steps=steps)
        self.checkpoint.check(
            val_check_interval=int(trainer.val_check_interval or 0), validates="validation" in self.data.examples
        )
        return steps

    def _finished(self, max_steps: int) -> bool:
        done = checkpoints.step_of(self._continued) if self._continued else 0
        if done < max_steps:
            return False
        # Else a stage whose data or loss was changed would be taken for done.
        self._compare()
        if self.trainer.is_global_zero:
            print(
                f"{self.folder} has already made {done} of {max_steps} steps; raise trainer.max_steps to go on, or "
                "choose another log.name to start anew"
            )
            print(summary(self.folder), flush=True)
        return True

    def _compare(self) -> None:
        """See that a run that goes on is still the one that it was."""
        self._settings = settings.of(self)
        said = checkpoints.record(self._continued) if self._continued else {}
        then = said.get("settings")
        if then is None or self._continued is None:
            return
        settings.check_experts(said["layout"], self, self._continued)
        assert self.resume is not None
        differ = settings.compare(then, self._settings, allowed=self.resume.allow_changes)
        for name, (old, new) in differ.items():
            say(f"{name}: was {old!r}, is {new!r} from here on, as resume.allow_changes says")

    # ---- NeMo's set-up ----------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        """When the run saves; checked with the arguments."""
        found = self.logger.ckpt
        assert isinstance(found, Checkpoint)
        return found

    def _connect(self, began: float) -> Preemption:
        """Tie model, data, loggers and checkpoints to the trainer."""
        trainer, model = self.trainer, self.model
        reference = self.reference if self.objective.needs_reference else None
        interleaved = self.strategy.virtual_pipeline_model_parallel_size is not None
        reductions = attach(model, self.objective, interleaved=interleaved)
        limits = self.limits or Limits()
        health = Health(self.data, reductions["train"], self.checkpoint, spike=limits.spike, run=self.folder)
        watch = Watch(
            data=self.data,
            reductions=reductions,
            reference=reference,
            runs=self.runs,
            csv_path=self.folder / "metrics.csv",
            continued=self._continued,
            start_adapters=self.resume.adapters if self.resume else None,
            health=health,
        )
        self.checkpoint.describe = functools.partial(settings.described, self, self._settings)
        preemption = Preemption(limits, self.checkpoint, began=began)
        # The Watchdog sees when the others begin; and a checkpoint is saved after the gates have passed.
        first = [Watchdog(self.folder, after=limits.hang_after), watch, health]
        then = [Lookahead(trainer, reductions, reference, seed=self.data.seed), Progress(watch), preemption]
        self._add_callbacks([*first, *then])
        if self._deterministic:
            kernels.switch_on(self._deterministic, model.config)
        kernels.choose_attention(model.config)
        ddp: Any = self.strategy.ddp_config
        ddp.check_for_nan_in_grad = False  # aligner.health looks
        # NeMo logs its own loss and step under other names; the Watch logs everything once.
        self.strategy.log_train_loss = False
        self.logger.update_logger_directory = False
        tensorboard = TensorBoardLogger(save_dir=self.runs, name=self.logger.name, version="tensorboard")
        if self.logger.wandb is not None:
            wandb_run.place(self.logger.wandb, self.folder, write=trainer.is_global_zero)
        self.logger.extra_loggers = [*self.logger.extra_loggers, tensorboard]
        state = self.logger.setup(trainer, resume_if_exists=True)
        # NeMo moves the files of earlier jobs to run_0, run_1, ...; the metrics of a run stay one file, and its lock
        # where the next job looks for it.
        stay = (watch.csv.path.name, provenance.RECIPE, *LOCK)
        state.files_to_move = [path for path in state.files_to_move if Path(path).name not in stay]
        if trainer.is_global_zero:
            recipe = provenance.write(self, self._settings)
            if self.logger.wandb is not None:
                wandb_run.describe(self.logger.wandb, recipe, train=self.data.train, fresh=self._continued is None)
        CallbackGroup.get_instance().update_config("v2", trainer=trainer, data=self.data)
        if self.resume is not None:
            if self.resume.restore_config is not None:
                # The tokenizer is known, and NeMo would take one that goes away with its checkpoint.
                self.resume.restore_config.load_artifacts = False
            self.resume.setup(trainer, model)
        assert self.optim is not None
        self.optim.connect(model)
        if self._continued is not None:
            say(f"goes on from step {checkpoints.step_of(self._continued)}: {self._continued}")
        elif self._start is not None:
            say(f"starts from {self._start}")
        tell(self)
        return preemption

    def _add_callbacks(self, ours: list[Any]) -> None:
        trainer: Any = self.trainer
        kept = [cb for cb in trainer.callbacks if not isinstance(cb, ProgressBar)]
        trainer.callbacks = [*ours, *kept]
        if self.peft is not None:
            self.model.model_transform = self.peft
            self.model.__io__.model_transform = self.peft.__io__
            trainer.callbacks.append(self.peft)
            assert isinstance(self.peft, ModelTransform)

    def _teardown(self, status: str) -> None:
        """Leave the process as it was found, so that a next run can follow in it."""
        for logger in self.trainer.loggers:
            logger.finalize(status)
        if self.trainer.is_global_zero:
            provenance.end(self.folder, status, sys.exc_info()[1])
            wandb_run.finish(self.logger.wandb, status, page=reporting.at_the_end(self.folder))
        if self._deterministic:
            kernels.switch_off()
        self.trainer._teardown()
        process.leave_ranks()
