"""NeMo's set-up of a run: callbacks, loggers, checkpoints and optimizer are connected to the trainer."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.pytorch.callbacks import ModelTransform, PreemptionCallback

from aligner.backend import kernels, threads
from aligner.callbacks.loss_anomaly import LossAnomalyCallback
from aligner.callbacks.metrics_callback import MetricsCallback
from aligner.callbacks.preemption import Preemption
from aligner.callbacks.progress import Progress
from aligner.callbacks.reference_callback import ReferenceCallback
from aligner.callbacks.step_preparation import StepPreparation
from aligner.callbacks.watchdog import Watchdog
from aligner.checkpoint.source_files import SourceFiles
from aligner.common import run_folder
from aligner.common.console import log_rank0
from aligner.model import policy
from aligner.train import provenance, resume_settings, wandb_run
from aligner.train.arguments import RunArguments
from aligner.train.limits import Limits
from aligner.train.starting_point import StartingPoint


def add_callbacks(
    arguments: RunArguments, start: StartingPoint, settings: resume_settings.Settings, *, began: float
) -> Preemption:
    """Attach the objective to the model and our callbacks to the trainer, in the order in which they must act."""
    trainer, checkpoint = arguments.trainer, arguments.checkpoint_callback
    reference, limits = arguments.used_reference, arguments.limits or Limits()
    interleaved = arguments.strategy.virtual_pipeline_model_parallel_size is not None
    reductions = policy.attach_objective(arguments.model, arguments.objective, interleaved=interleaved)
    anomalies = LossAnomalyCallback(
        arguments.data, reductions["train"], checkpoint, loss_spike_std=limits.loss_spike_std, run=arguments.folder
    )
    metrics = MetricsCallback(
        data=arguments.data,
        reductions=reductions,
        csv_path=arguments.folder / run_folder.METRICS,
        anomalies=anomalies,
        policy_is_reference=reference is not None,
    )
    references = ReferenceCallback(
        data=arguments.data,
        reductions=reductions,
        reference=reference,
        runs=arguments.runs,
        resumed=start.resumed,
        start_adapters=arguments.resume.adapters if arguments.resume else None,
    )
    if arguments.trainer.is_global_zero:
        checkpoint.source_files = SourceFiles(start.checkpoint)
    checkpoint.describe = functools.partial(resume_settings.checkpoint_metadata, arguments, settings)
    theirs, signals = _callbacks_of_recipe(trainer)
    preemption = Preemption(limits.seconds, checkpoint, began=began, more_signals=signals)
    ours = [
        # First, to record the phase before the other callbacks run.
        Watchdog(arguments.folder, hang_timeout_s=limits.hang_timeout_s),
        references,
        # Validates the starting policy after its reference is prepared; checkpoints are saved after its checks.
        metrics,
        anomalies,
        StepPreparation(trainer, reductions, reference, seed=arguments.data.seed),
        Progress(metrics),
        provenance.FilesOfNeMo(arguments.folder),
        preemption,
    ]
    trainer.callbacks = [*ours, *theirs]  # type: ignore[attr-defined]
    if arguments.peft is not None:
        assert isinstance(arguments.peft, ModelTransform)
        arguments.model.model_transform = arguments.peft
        arguments.model.__io__.model_transform = arguments.peft.__io__
        trainer.callbacks.append(arguments.peft)  # type: ignore[attr-defined]
    return preemption


def _callbacks_of_recipe(trainer: Any) -> tuple[list[Any], list[int]]:
    """Return the callbacks of the recipe that stay, and the signals of those whose place ours takes."""
    replaced = [callback for callback in trainer.callbacks if isinstance(callback, PreemptionCallback)]
    if replaced:
        # It would take the signal from ours, and end the job with code 0 before all steps are made.
        log_rank0("trainer.callbacks: NeMo's PreemptionCallback is left out; a run saves on signals by itself")
    theirs = [cb for cb in trainer.callbacks if not isinstance(cb, ProgressBar | PreemptionCallback)]
    return theirs, [int(callback.sig) for callback in replaced]


def choose_kernels(arguments: RunArguments) -> None:
    """Switch on deterministic kernels if requested, and choose the attention backend and the number of threads.

    Raises:
        ConfigError: the environment demands other kernels.
    """
    if arguments.deterministic:
        kernels.switch_on(arguments.deterministic, arguments.model.config)
    kernels.choose_attention(arguments.model.config)
    threads.choose_num_threads(arguments.model.config.hidden_size)


def connect(arguments: RunArguments) -> None:
    """Connect loggers, checkpoints and optimizer to the trainer."""
    trainer, logger, strategy = arguments.trainer, arguments.logger, arguments.strategy
    ddp: Any = strategy.ddp_config
    ddp.check_for_nan_in_grad = False  # LossAnomalyCallback checks
    # NeMo logs its own loss and step under other names; MetricsCallback logs everything once.
    strategy.log_train_loss = False
    logger.update_logger_directory = False
    if logger.wandb is not None:
        wandb_run.place(logger.wandb, arguments.folder, write=trainer.is_global_zero)
    tensorboard = TensorBoardLogger(save_dir=arguments.runs, name=logger.name, version="tensorboard")
    logger.extra_loggers = [*logger.extra_loggers, tensorboard]
    state = logger.setup(trainer, resume_if_exists=True)
    # NeMo moves all files that it finds in the run's folder to run_0, run_1, ...: metrics, and what is somebody's.
    state.files_to_move = []
    CallbackGroup.get_instance().update_config("v2", trainer=trainer, data=arguments.data)
    resume = arguments.resume
    if resume is not None:
        if resume.restore_config is not None:
            # The tokenizer is set, and NeMo would load one that is removed with its checkpoint.
            resume.restore_config.load_artifacts = False
        resume.setup(trainer, arguments.model)
    assert arguments.optim is not None
    arguments.optim.connect(arguments.model)
