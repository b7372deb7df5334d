"""What is refused before anything is written: arguments that contradict each other or this machine."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, get_args

from nemo.lightning import MegatronStrategy

from aligner import cpu
from aligner.cutting import END_TO_END, Batching
from aligner.data import AlignDataModule
from aligner.errors import ConfigError
from aligner.examples import OverLong
from aligner.hardware import fused_adam
from aligner.layout import special_attention
from aligner.prepacked import is_packed
from aligner.reference import AdaptersOff
from aligner.saving import Checkpoint

if TYPE_CHECKING:
    from aligner.engine import Run


def arguments(run: Run) -> None:
    """What can be told from the arguments alone.

    Raises:
        ConfigError: naming the one that is wrong.
    """
    for name in ("preference_weight", "sft_weight"):
        if not 0 <= getattr(run, name) < math.inf:
            raise ConfigError(f"{name}: must not be negative, found {getattr(run, name)}")
    if not run.preference_weight and not run.sft_weight:
        raise ConfigError("preference_weight, sft_weight: both are 0, so there is nothing to learn; raise one")
    if not isinstance(run.trainer.strategy, MegatronStrategy):
        raise ConfigError(
            f"trainer.strategy: must be NeMo's MegatronStrategy, found {type(run.trainer.strategy).__name__}"
        )
    limit = run.trainer.limit_train_batches
    if limit not in (1.0, None) or isinstance(limit, int):  # 1 is one batch, 1.0 all of them
        raise ConfigError(
            f"trainer.limit_train_batches: {limit} would show the run the same global batches over and over; leave it "
            "out, and set trainer.max_steps"
        )
    _loss(run)
    _folders(run)
    if not isinstance(run.logger.ckpt, Checkpoint):
        raise ConfigError(
            f"log.ckpt: is {type(run.logger.ckpt).__name__}; a run saves with "
            "run.Config(aligner.saving.Checkpoint), as every recipe does"
        )
    if run.optim is None:
        raise ConfigError("optim: is None; give NeMo's MegatronOptimizerModule, as every recipe does")
    lr, least = run.optim.config.lr, getattr(run.optim.lr_scheduler, "min_lr", None)
    if lr is not None and least is not None and least > lr:
        raise ConfigError(
            f"optim.lr_scheduler.min_lr: {least} is above optim.config.lr={lr}; a rate that stays constant after the "
            f"warm-up has both alike: optim.config.lr={lr} optim.lr_scheduler.min_lr={lr}"
        )


def _loss(run: Run) -> None:
    if not run.preference_weight:
        return
    try:
        needs_reference = run.objective.needs_reference
    except ValueError as error:
        # Those of the losses begin with the argument that is wrong.
        raise ConfigError(f"loss{'.' if re.match(r'[a-z_, ]+: ', str(error)) else ': '}{error}") from None
    if needs_reference and run.reference is None:
        raise ConfigError(
            "reference: is None, but the loss holds the policy to a reference; "
            "use run.Config(aligner.reference.Cached), or preference_weight=0"
        )
    if needs_reference and isinstance(run.reference, AdaptersOff) and run.peft is None:
        raise ConfigError(
            "reference: AdaptersOff, but peft is None, so there are no adapters to switch off; set "
            "peft=run.Config(llm.peft.LoRA), or use run.Config(Cached)"
        )
    live = needs_reference and run.reference is not None and run.reference.live
    if live and getattr(run.strategy.ddp_config, "overlap_param_gather", False):
        raise ConfigError(
            "trainer.strategy.ddp.overlap_param_gather: True, but a live reference takes the weights' place while "
            "they would be gathered; set it to False, or use run.Config(aligner.reference.Cached)"
        )


def _folders(run: Run) -> None:
    for name in ("explicit_log_dir", "version"):
        if getattr(run.logger, name):
            raise ConfigError(f"log.{name}: is set; a run lives in log.log_dir/log.name, so that it can be continued")
    if not run.logger.name:
        raise ConfigError("log.name: is empty; name the run")
    # NeMo takes `~` as it stands.
    run.logger.log_dir = str(run.runs)
    for name in ("resume_from_path", "resume_from_directory", "resume_past_end"):
        if getattr(run.resume, name, None):
            raise ConfigError(
                f"resume.{name}: is set; a run goes on from its own folder (log.log_dir, log.name), a fresh one "
                "starts from resume.restore_config.path or resume.start_from"
            )
    if run.resume and run.resume.restore_config and run.resume.start_from:
        raise ConfigError("resume.restore_config, resume.start_from: both say where to start; set one to None")


def layout(run: Run) -> None:
    """How the ranks are divided, and the batches over them.

    Raises:
        ConfigError: they cannot be, or not in this version; or a size is not positive.
    """
    parallel = run.strategy.parallelism
    world = run.trainer.num_nodes * run.trainer.num_devices
    context = parallel.context_parallel_size
    cut = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * context
    if world % cut:
        raise ConfigError(
            f"trainer.strategy: {world} ranks cannot be divided into groups of "
            f"tensor_model_parallel_size={parallel.tensor_model_parallel_size} times "
            f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
            + (f" times context_parallel_size={context}" if context > 1 else "")
        )
    _batches(run.data, data_parallel_size=world // cut)
    _end_to_end(run)


def started(run: Run) -> None:
    """That as many ranks were started as the run is to have.

    Raises:
        ConfigError: there are others.
    """
    world = run.trainer.num_nodes * run.trainer.num_devices
    started = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    if world != started:
        raise ConfigError(
            f"trainer.devices, trainer.num_nodes: {run.trainer.num_devices} x {run.trainer.num_nodes} = {world} "
            f"ranks, but {started} were started; launch with an executor of as many ranks, for example "
            f"run.executor=local run.executor.ranks={world}"
        )


def machine(run: Run) -> None:
    """What this machine lacks.

    Raises:
        ConfigError: the run needs it.
    """
    assert run.optim is not None
    if getattr(run.optim.config, "use_distributed_optimizer", False) and not fused_adam():
        raise ConfigError(
            "optim.config.use_distributed_optimizer: True, but neither Transformer Engine nor Apex is here; "
            "without their Adam, Megatron saves this optimizer and cannot load it. Install transformer-engine "
            "on a GPU, or set it to False"
        )
    data, config = run.data, run.model.config
    asked = special_attention(config)
    if _lies_end_to_end(data) and asked and cpu.no_transformer_engine():
        raise ConfigError(
            f"data.batching: {data.batching} lays sequences end to end, but the model asks for {', '.join(asked)}, "
            "which without Transformer Engine only Megatron's attention for padded batches knows; use "
            "data.batching=length_grouped, or install transformer-engine on a GPU"
        )


def _end_to_end(run: Run) -> None:
    """Sequences that lie end to end need an attention that keeps them apart."""
    data, config = run.data, run.model.config
    if _lies_end_to_end(data) and getattr(config, "attn_logit_softcapping", None):
        raise ConfigError(
            f"data.batching: {data.batching} lays sequences end to end, which NeMo's attention for "
            "model.config.attn_logit_softcapping (Gemma 2) refuses; use data.batching=length_grouped"
        )


def _lies_end_to_end(data: AlignDataModule) -> bool:
    return data.batching in END_TO_END or any(map(is_packed, (data.train, data.validation)))


def _batches(data: AlignDataModule, *, data_parallel_size: int) -> None:
    if not data.train:
        raise ConfigError("data.train: is empty; give a file of preference rows")
    for name, kinds in (("over_long", OverLong), ("batching", Batching)):
        if getattr(data, name) not in get_args(kinds):
            raise ConfigError(f"data.{name}: {getattr(data, name)!r} is not one of {', '.join(get_args(kinds))}")
    for name in ("micro_batch_size", "global_batch_size", "seq_length"):
        if getattr(data, name) < 1:
            raise ConfigError(f"data.{name}: must be at least 1, found {getattr(data, name)}")
    if data.pack_size is not None and data.pack_size < 1:
        raise ConfigError(f"data.pack_size: must be at least 1, found {data.pack_size}")
    packed = data.batching == "packed"
    if data.pack_size is not None and not packed:
        raise ConfigError(
            f"data.pack_size: {data.pack_size}, but data.batching is {data.batching!r}, which has no packs; set "
            "data.batching=packed, or leave data.pack_size None"
        )
    per_pass = data_parallel_size * (1 if packed else data.micro_batch_size)
    if data.global_batch_size % per_pass:
        sizes = "" if packed else f"data.micro_batch_size={data.micro_batch_size} times "
        raise ConfigError(
            f"data.global_batch_size: {data.global_batch_size} cannot be cut into micro-batches: "
            f"{sizes}{data_parallel_size} data-parallel ranks is {per_pass}; use a multiple of {per_pass}"
        )
