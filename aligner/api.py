"""`align`: the function that every recipe points at. It hands the run's report and W&B table to the run.

The command line imports this module before anything is asked of it, so heavy modules are imported inside.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch

from aligner import losses

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.lightning import MegatronOptimizerModule, NeMoLogger, Trainer
    from nemo.lightning.pytorch.callbacks import PEFT

    from aligner.checkpoint.resume import Resume
    from aligner.data.module import AlignDataModule
    from aligner.model.reference import Reference
    from aligner.train.limits import Limits


def align(
    model: "pl.LightningModule",
    data: "AlignDataModule",
    trainer: "Trainer",
    loss: Callable[..., torch.Tensor] = losses.dpo,
    preference_loss_weight: float = 1.0,
    sft_loss_weight: float = 0.0,
    reference: Optional["Reference"] = None,
    peft: Optional["PEFT"] = None,
    log: Optional["NeMoLogger"] = None,
    optim: Optional["MegatronOptimizerModule"] = None,
    resume: Optional["Resume"] = None,
    limits: Optional["Limits"] = None,
) -> Path:
    """Train a policy on preferences or demonstrations. If the run folder holds a checkpoint, training resumes from it.

    Minimizes preference_loss_weight · loss + sft_loss_weight · (-log π(chosen)/|chosen|) of each pair (or single
    response), averaged over those of a global batch.

    Args:
        model: a NeMo GPT model (`run.Config(llm.LlamaModel, ...)`).
        data: files of rows, and how they become batches.
        trainer: NeMo's trainer with a MegatronStrategy.
        loss: a function of `aligner.losses`, as `run.Partial(losses.dpo, beta=0.1)`, or any function of
            `losses.PairLogprobs` or `losses.ResponseLogprobs`. Its input decides whether rows are read as pairs or as
            single responses.
        preference_loss_weight: weight of the loss; 0 trains on demonstrations: chosen or single responses.
        sft_loss_weight: weight of the chosen response's negative log-likelihood per token.
        reference: the reference model (`aligner.model.reference`); not prepared if the loss reads none.
        peft: NeMo's LoRA or DoRA, to train adapters only.
        log: the run's folder (`log.log_dir`/`log.name`), loggers, checkpoints.
        optim: Megatron's optimizer and learning rate schedule.
        resume: the checkpoint that a fresh run starts from, and whether an existing run is resumed.
        limits: time limit of this job, hang timeout, loss-spike threshold.

    Returns:
        The run's folder: checkpoints/, metrics.csv, report.html and the files of the loggers.

    Raises:
        UserError: an argument, data file or checkpoint is invalid. Raised before training begins, except for a full
            disk; tokenized rows may be left behind.
        SanityCheckError: the first step contradicts theory, or a loss is not finite.
        SystemExit: with code 75, after a signal or at the time limit: the job has saved and is to be run again.
    """
    from aligner.judge.iteration_report import log_iteration
    from aligner.report.run_page import write_final_report
    from aligner.train.arguments import RunArguments
    from aligner.train.training_run import Hooks, TrainingRun

    arguments = RunArguments(
        model=model, data=data, trainer=trainer, loss=loss, preference_loss_weight=preference_loss_weight,
        sft_loss_weight=sft_loss_weight, reference=reference, peft=peft, log=log, optim=optim, resume=resume,
        limits=limits,
    )  # fmt: skip
    return TrainingRun(arguments, Hooks(on_wandb_start=log_iteration, on_end=write_final_report))()
