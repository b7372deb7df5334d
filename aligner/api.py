"""`align`: the one function that every preference recipe points at.

This module is imported by the command line before anything is asked of it; what is heavy is imported inside.
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

    from aligner.checkpoints import Resume
    from aligner.data import AlignDataModule
    from aligner.limits import Limits
    from aligner.reference import Reference


def align(
    model: "pl.LightningModule",
    data: "AlignDataModule",
    trainer: "Trainer",
    loss: Callable[..., torch.Tensor] = losses.dpo,
    preference_weight: float = 1.0,
    sft_weight: float = 0.0,
    reference: Optional["Reference"] = None,
    peft: Optional["PEFT"] = None,
    log: Optional["NeMoLogger"] = None,
    optim: Optional["MegatronOptimizerModule"] = None,
    resume: Optional["Resume"] = None,
    limits: Optional["Limits"] = None,
) -> Path:
    """Train a policy on preferences or demonstrations; run again, it goes on where it was.

    Minimises preference_weight · loss + sft_weight · (-log π(chosen)/|chosen|) of each pair (or single response),
    averaged over those of a global batch.

    Args:
        model: a NeMo GPT model (`run.Config(llm.LlamaModel, ...)`).
        data: files of rows and how they become batches.
        trainer: NeMo's trainer with a MegatronStrategy.
        loss: a function of `aligner.losses` or `aligner.unpaired`, as `run.Partial(losses.dpo, beta=0.1)`; or any
            function of `losses.PairLogprobs`. It decides whether rows are read as pairs or as single responses.
        preference_weight: of the loss; 0 trains on demonstrations: chosen or single responses.
        sft_weight: of the chosen response's negative log-likelihood per token.
        reference: whose log-probabilities the policy is held to (`aligner.reference`); not prepared if the loss
            reads none.
        peft: NeMo's LoRA or DoRA, to train adapters only.
        log: where the run lives (`log.log_dir`/`log.name`), loggers, checkpoints.
        optim: Megatron's optimizer and learning rate schedule.
        resume: what a fresh run starts from, and whether an old one is continued.
        limits: when this job ends, to be run again, and when it is taken for hung.

    Returns:
        The run's folder: checkpoints/, metrics.csv and what the loggers write.

    Raises:
        UserError: something given is not as it must be; found before the run begins (tokenised rows may be left),
            a full disk apart.
        GateError: the first step contradicts theory, or a loss is not finite.
        SystemExit: with code 75; the job was told to end, has saved, and is to be run again.
    """
    from aligner.engine import Run

    run = Run(
        model=model, data=data, trainer=trainer, loss=loss, preference_weight=preference_weight,
        sft_weight=sft_weight, reference=reference, peft=peft, log=log, optim=optim, resume=resume,
        limits=limits,
    )  # fmt: skip
    return run()
