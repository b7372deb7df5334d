"""Checks before anything is written: arguments that contradict each other or this machine."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, get_args

from nemo.lightning import MegatronStrategy

from aligner.backend import device, distributed
from aligner.backend.hardware import fused_adam
from aligner.callbacks.checkpointing import CheckpointCallback
from aligner.common.errors import ConfigError
from aligner.data.examples import Overlong
from aligner.data.microbatches import CONCATENATED, Batching
from aligner.data.module import AlignDataModule
from aligner.data.prepacked import is_packed
from aligner.model.parallelism import special_attention
from aligner.model.reference import BaseModelReference
from aligner.train.arguments import RunArguments

LONGEST_WARMUP = 10
"""Steps; NVIDIA's guide."""


def check_arguments(arguments: RunArguments) -> None:
    """Check the arguments by themselves.

    Raises:
        ConfigError: an argument is invalid; the message names it.
    """
    for name in ("preference_loss_weight", "sft_loss_weight"):
        if not 0 <= getattr(arguments, name) < math.inf:
            raise ConfigError(f"{name}: must not be negative, found {getattr(arguments, name)}")
    if not arguments.preference_loss_weight and not arguments.sft_loss_weight:
        raise ConfigError(
            "preference_loss_weight, sft_loss_weight: both are 0, so there is nothing to learn; raise one"
        )
    if not isinstance(arguments.trainer.strategy, MegatronStrategy):
        raise ConfigError(
            f"trainer.strategy: must be NeMo's MegatronStrategy, found {type(arguments.trainer.strategy).__name__}"
        )
    limit = arguments.trainer.limit_train_batches
    if limit not in (1.0, None) or isinstance(limit, int):  # 1 is one batch, 1.0 all of them
        raise ConfigError(
            f"trainer.limit_train_batches: {limit} would show the run the same global batches over and over; leave it "
            "out, and set trainer.max_steps"
        )
    _check_loss(arguments)
    _check_folders(arguments)
    if not isinstance(arguments.logger.ckpt, CheckpointCallback):
        raise ConfigError(
            f"log.ckpt: is {type(arguments.logger.ckpt).__name__}; a run saves with "
            "run.Config(aligner.callbacks.checkpointing.CheckpointCallback), as every recipe does"
        )
    if arguments.optim is None:
        raise ConfigError("optim: is None; give NeMo's MegatronOptimizerModule, as every recipe does")
    lr, min_lr = arguments.optim.config.lr, getattr(arguments.optim.lr_scheduler, "min_lr", None)
    if lr is not None and min_lr is not None and min_lr > lr:
        raise ConfigError(
            f"optim.lr_scheduler.min_lr: {min_lr} is above optim.config.lr={lr}; a rate that stays constant after the "
            f"warm-up has both alike: optim.config.lr={lr} optim.lr_scheduler.min_lr={lr}"
        )


def _check_loss(arguments: RunArguments) -> None:
    if not arguments.preference_loss_weight:
        return
    try:
        needs_reference = arguments.objective.needs_reference
    except ValueError as error:
        # Messages of the losses begin with the invalid argument.
        raise ConfigError(f"loss{'.' if re.match(r'[a-z_, ]+: ', str(error)) else ': '}{error}") from None
    if needs_reference and arguments.reference is None:
        raise ConfigError(
            "reference: is None, but the loss holds the policy to a reference; "
            "use run.Config(aligner.model.reference.CachedReference), or preference_loss_weight=0"
        )
    if needs_reference and isinstance(arguments.reference, BaseModelReference) and arguments.peft is None:
        raise ConfigError(
            "reference: BaseModelReference, but peft is None, so there are no adapters to switch off; set "
            "peft=run.Config(llm.peft.LoRA), or use run.Config(CachedReference)"
        )
    live = needs_reference and arguments.reference is not None and arguments.reference.scored_per_step
    if live and getattr(arguments.strategy.ddp_config, "overlap_param_gather", False):
        raise ConfigError(
            "trainer.strategy.ddp.overlap_param_gather: True, but a live reference takes the weights' place while "
            "they would be gathered; set it to False, or use run.Config(aligner.model.reference.CachedReference)"
        )


def _check_folders(arguments: RunArguments) -> None:
    for name in ("explicit_log_dir", "version"):
        if getattr(arguments.logger, name):
            raise ConfigError(f"log.{name}: is set; a run lives in log.log_dir/log.name, so that it can be continued")
    name = arguments.logger.name
    if not name:
        raise ConfigError("log.name: is empty; name the run")
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts or not name.isprintable():
        raise ConfigError(
            f"log.name: {name!r} does not lead to a folder of its own within log.log_dir; give a name, as dpo or "
            "sums/dpo, and the place as log.log_dir"
        )
    if not arguments.runs.is_absolute() and _in_folder_of_nemo_run():
        raise ConfigError(
            f"log.log_dir: {str(arguments.runs)!r} is relative, and this job begins in NeMo-Run's own folder "
            f"{Path.cwd()}, where the next one would not look; give an absolute one, as "
            "recipe.log.log_dir=os.path.abspath('runs'), or use aligner.executors.slurm or docker, which begin where "
            "they were called"
        )
    # NeMo does not expand `~`.
    arguments.logger.log_dir = str(arguments.runs)
    for name in ("resume_from_path", "resume_from_directory", "resume_past_end"):
        if getattr(arguments.resume, name, None):
            raise ConfigError(
                f"resume.{name}: is set; a run goes on from its own folder (log.log_dir, log.name), a fresh one "
                "starts from resume.restore_config.path or resume.init_stage"
            )
    if arguments.resume and arguments.resume.restore_config and arguments.resume.init_stage:
        raise ConfigError("resume.restore_config, resume.init_stage: both say where to start; set one to None")


def _in_folder_of_nemo_run() -> bool:
    """Return whether a job is in the folder into which NeMo-Run's executors copy code, beside its configs."""
    here = Path.cwd()
    return here.name == "code" and (here.parent / "configs").is_dir() and not os.path.ismount(here)


def check_parallelism(arguments: RunArguments) -> None:
    """Check that the parallel sizes divide the ranks, and the ranks the batches.

    Raises:
        ConfigError: a size does not divide, is not positive, or the model cannot separate concatenated sequences.
    """
    parallel = arguments.strategy.parallelism
    world = arguments.num_ranks
    context, ranks_per_replica = parallel.context_parallel_size, _ranks_per_replica(arguments)
    if world % ranks_per_replica:
        raise ConfigError(
            f"trainer.strategy: {world} ranks cannot be divided into groups of "
            f"tensor_model_parallel_size={parallel.tensor_model_parallel_size} times "
            f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
            + (f" times context_parallel_size={context}" if context > 1 else "")
        )
    _check_batches(arguments.data, data_parallel_size=world // ranks_per_replica)
    _check_concatenated(arguments)


def check_world_size(arguments: RunArguments) -> None:
    """Check the number of started ranks.

    Raises:
        ConfigError: the number differs from trainer.devices x trainer.num_nodes.
    """
    world = arguments.num_ranks
    started = distributed.started_ranks()
    if world != started:
        raise ConfigError(
            f"trainer.devices, trainer.num_nodes: {arguments.trainer.num_devices} x {arguments.trainer.num_nodes} = "
            f"{world} ranks, but {started} were started; launch with an executor of as many ranks, for example "
            f"run.executor=local run.executor.ntasks_per_node={world}"
        )


def warmup_steps(arguments: RunArguments) -> int:
    """Return the steps in which the learning rate rises; 0 without a warm-up."""
    return getattr(arguments.optim and arguments.optim.lr_scheduler, "warmup_steps", 0) or 0


def set_warmup(arguments: RunArguments, max_steps: int, recorded: int | None) -> None:
    """Set a warm-up of None: a tenth of the run, at most ten steps; of a run that is resumed, as recorded."""
    scheduler: Any = arguments.optim and arguments.optim.lr_scheduler
    if getattr(scheduler, "warmup_steps", 0) is None:
        scheduler.warmup_steps = min(LONGEST_WARMUP, max_steps // 10) if recorded is None else recorded


def long_warmup(arguments: RunArguments, max_steps: int) -> str | None:
    """Describe a warm-up that does not end before the run does; None if it ends."""
    warmup = warmup_steps(arguments)
    if max_steps <= 0 or warmup < max_steps:
        return None
    return (
        f"optim.lr_scheduler.warmup_steps: {warmup} steps of warm-up, but the run has {max_steps}; its rate ends at "
        f"{max_steps / warmup:.0%} of optim.config.lr; a tenth of the steps is usual"
    )


def num_steps(arguments: RunArguments, steps_per_epoch: int) -> int:
    """Return the optimizer steps of the run; below 1 if nothing limits them."""
    trainer = arguments.trainer
    limits = [trainer.max_steps, (trainer.max_epochs or -1) * steps_per_epoch]
    return min((limit for limit in limits if limit > 0), default=-1)


def check_hardware(arguments: RunArguments) -> None:
    """Check that this machine supports the run.

    Raises:
        ConfigError: the run needs Transformer Engine or Apex, which is not installed.
    """
    assert arguments.optim is not None
    if getattr(arguments.optim.config, "use_distributed_optimizer", False) and not fused_adam():
        raise ConfigError(
            "optim.config.use_distributed_optimizer: True, but neither Transformer Engine nor Apex is here; "
            "without their Adam, Megatron saves this optimizer and cannot load it. Install transformer-engine "
            "on a GPU, or set it to False"
        )
    data, config = arguments.data, arguments.model.config
    special = special_attention(config)
    if _is_concatenated(data) and special and device.no_transformer_engine():
        raise ConfigError(
            f"data.batching: {data.batching} lays sequences end to end, but the model asks for {', '.join(special)}, "
            "which without Transformer Engine only Megatron's attention for padded batches knows; use "
            "data.batching=length_grouped, or install transformer-engine on a GPU"
        )


def _check_concatenated(arguments: RunArguments) -> None:
    """Check that the model's attention can separate concatenated sequences."""
    data, config = arguments.data, arguments.model.config
    if _is_concatenated(data) and getattr(config, "attn_logit_softcapping", None):
        raise ConfigError(
            f"data.batching: {data.batching} lays sequences end to end, which NeMo's attention for "
            "model.config.attn_logit_softcapping (Gemma 2) refuses; use data.batching=length_grouped"
        )


def _is_concatenated(data: AlignDataModule) -> bool:
    return data.batching in CONCATENATED or any(map(is_packed, (data.train, data.validation)))


def examples_per_pass(arguments: RunArguments) -> int:
    """Return the examples of one micro-batch on all ranks; a global batch is a multiple of it."""
    return _examples_per_pass(arguments.data, arguments.num_ranks // _ranks_per_replica(arguments))


def _ranks_per_replica(arguments: RunArguments) -> int:
    parallel = arguments.strategy.parallelism
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _examples_per_pass(data: AlignDataModule, data_parallel_size: int) -> int:
    return data_parallel_size * (1 if data.batching == "packed" else data.micro_batch_size)


def _check_batches(data: AlignDataModule, *, data_parallel_size: int) -> None:
    if not data.train:
        raise ConfigError("data.train: is empty; give a file of preference rows")
    for name, kinds in (("overlong", Overlong), ("batching", Batching)):
        if getattr(data, name) not in get_args(kinds):
            raise ConfigError(f"data.{name}: {getattr(data, name)!r} is not one of {', '.join(get_args(kinds))}")
    for name in ("micro_batch_size", "global_batch_size", "seq_length"):
        if getattr(data, name) < 1:
            raise ConfigError(f"data.{name}: must be at least 1, found {getattr(data, name)}")
    if data.packed_sequence_size is not None and data.packed_sequence_size < 1:
        raise ConfigError(f"data.packed_sequence_size: must be at least 1, found {data.packed_sequence_size}")
    packed = data.batching == "packed"
    if data.packed_sequence_size is not None and not packed:
        raise ConfigError(
            f"data.packed_sequence_size: {data.packed_sequence_size}, but data.batching is {data.batching!r}, which "
            "has no packs; set data.batching=packed, or leave data.packed_sequence_size None"
        )
    per_pass = _examples_per_pass(data, data_parallel_size)
    if data.global_batch_size % per_pass:
        sizes = "" if packed else f"data.micro_batch_size={data.micro_batch_size} times "
        raise ConfigError(
            f"data.global_batch_size: {data.global_batch_size} cannot be cut into micro-batches: "
            f"{sizes}{data_parallel_size} data-parallel ranks is {per_pass}; use a multiple of {per_pass}"
        )
