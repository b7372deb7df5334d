"""Shared parts of all recipes: a run of a model, and the training methods, which set its objective."""

from typing import Optional

import nemo_run as run

from aligner import losses
from aligner.api import align
from aligner.losses import unpaired
from aligner.recipes.signatures import AlignArguments


def recipe(
    arguments: AlignArguments,
    *,
    model: run.Config,
    max_steps: int = -1,
    max_epochs: int = 1,
    validate_every: int | float = 0.1,
    save_every: int = 50,
    micro_batch_size: int = 1,
    global_batch_size: int = 256,
    lr: float = 9e-7,
    min_lr: float = 9e-7,
    warmup_steps: Optional[int] = None,
    apply_chat_template: bool = False,
) -> run.Partial:
    """Return a run of a model without an objective; a method adds it.

    `packed_sequence` fills micro-batches by tokens (`aligner.data.microbatches`). `init_from` is a checkpoint, a
    Hugging Face folder, `hf://name`, or the recipe of a stage that writes a checkpoint. The defaults are those of
    NVIDIA's guide (docs/hyperparameters.md).
    """
    from aligner.checkpoint.resume import Resume
    from aligner.data.module import AlignDataModule
    from aligner.train.limits import Limits

    resume, init_from = run.Config(Resume), arguments.init_from
    if isinstance(init_from, run.Partial):
        resume.init_stage = init_from
    elif init_from is not None:
        from nemo.lightning import RestoreConfig

        resume.restore_config = run.Config(RestoreConfig, path=init_from)
    return run.Partial(
        align,
        model=model,
        data=run.Config(
            AlignDataModule,
            train=arguments.train,
            validation=arguments.validation,
            seq_length=arguments.seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            apply_chat_template=apply_chat_template,
            batching="packed" if arguments.packed_sequence else "padded",
        ),
        trainer=trainer(
            arguments.num_nodes or 1,
            arguments.num_gpus_per_node,
            max_steps=max_steps,
            max_epochs=max_epochs,
            validate_every=validate_every,
        ),
        peft=adapters(arguments.peft_scheme),
        log=log(arguments.dir, arguments.name, save_every=save_every),
        optim=adam(lr, min_lr=min_lr, warmup_steps=warmup_steps, max_steps=max_steps),
        resume=resume,
        limits=run.Config(Limits),
    )


# ---- methods ------------------------------------------------------------------------------------------------------


def dpo(recipe: run.Partial) -> run.Partial:
    """Set direct preference optimization; the reference is the initial policy."""
    return _preference(recipe, run.Partial(losses.dpo, beta=0.1))


def ipo(recipe: run.Partial) -> run.Partial:
    """Set identity preference optimization, with log-probabilities averaged over tokens as its authors intend."""
    return _preference(recipe, run.Partial(losses.ipo, beta=0.1))


def rpo(recipe: run.Partial) -> run.Partial:
    """Set reward-aware preference optimization with backward KL, as NVIDIA uses it, for rows with rewards."""
    return _preference(recipe, run.Partial(losses.rpo_bwd_kl, beta=0.1, reward_scale=1.0))


def kto(recipe: run.Partial) -> run.Partial:
    """Set Kahneman-Tversky optimization of single responses; a pair is split into two."""
    return _preference(recipe, run.Partial(unpaired.kto, beta=0.1))


def _preference(recipe: run.Partial, loss: run.Partial) -> run.Partial:
    from aligner.model.reference import CachedReference

    recipe.loss, recipe.reference = loss, run.Config(CachedReference)
    return recipe


def sft(recipe: run.Partial) -> run.Partial:
    """Set supervised fine-tuning on demonstrations: the response's negative log-likelihood per token."""
    recipe.preference_loss_weight, recipe.sft_loss_weight = 0.0, 1.0
    return recipe


# ---- parts --------------------------------------------------------------------------------------------------------


def adapters(scheme: Optional[str]) -> run.Config | None:
    """Return NeMo's LoRA or DoRA for all linear layers of attention and MLP, or None to train all weights.

    Raises:
        ValueError: the scheme is unknown.
    """
    if scheme is None or str(scheme).lower() == "none":
        return None
    from nemo.collections.llm import peft

    schemes = {"lora": peft.LoRA, "dora": peft.DoRA}
    if scheme not in schemes:
        raise ValueError(f"peft_scheme: is {scheme!r}; expected 'lora', 'dora' or None")
    return run.Config(schemes[scheme], dim=32, alpha=32, dropout=0.0)


def trainer(
    num_nodes: int, num_gpus_per_node: int, *, max_steps: int, max_epochs: int, validate_every: int | float
) -> run.Config:
    """Return NeMo's trainer with Megatron: bfloat16 on GPUs, float32 on a CPU.

    Training stops after `max_steps` or `max_epochs` (-1: no limit), whichever comes first. `validate_every` is the
    validation interval: a number of steps, or a fraction of an epoch.
    """
    from nemo import lightning as nl

    from aligner.backend import hardware

    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        gradient_as_bucket_view=True,
        ckpt_async_save=False,
        # Checkpoints load with any parallel sizes, also with Megatron's distributed optimizer.
        ckpt_optim_fully_reshardable=True,
    )
    return run.Config(
        nl.Trainer,
        accelerator="auto",
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        strategy=strategy,
        plugins=run.Config(hardware.precision_plugin),
        max_steps=max_steps,
        max_epochs=max_epochs,
        val_check_interval=validate_every,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[],  # NeMo's plugins append to it
    )


def log(dir: str, name: str, *, save_every: int) -> run.Config:
    """Return the logger: run folder and checkpointing; the newest checkpoint is kept for resuming."""
    from nemo import lightning as nl

    from aligner.callbacks.checkpointing import CheckpointCallback

    checkpoint = run.Config(CheckpointCallback, every_n_train_steps=save_every, save_top_k=1)
    return run.Config(nl.NeMoLogger, log_dir=dir, name=name, use_datetime_version=False, ckpt=checkpoint)


def adam(lr: float, *, min_lr: float, warmup_steps: Optional[int], max_steps: int) -> run.Config:
    """Return Megatron's Adam with linear warmup and cosine decay to `min_lr`.

    A warm-up of None is a tenth of the run's steps, at most 10.
    """
    from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

    from aligner.backend import hardware

    return run.Config(
        MegatronOptimizerModule,
        config=run.Config(hardware.optimizer_config, lr=lr),
        lr_scheduler=run.Config(
            CosineAnnealingScheduler,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            constant_steps=0,
            min_lr=min_lr,
        ),
    )
