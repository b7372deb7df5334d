"""Log-probabilities of batches under the model's current weights, without gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor
from tqdm import tqdm

from aligner.backend.device import communication_device
from aligner.common.console import messages
from aligner.data.batch import Batch, Split
from aligner.data.module import AlignDataModule
from aligner.model import policy

SCORING = -1
"""Step number of scoring, which lets callbacks on Megatron's steps distinguish scoring from training."""


class _LogprobCollector(MegatronLossReduction):
    """Loss reduction that collects log-probabilities; only the last pipeline stage calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.logps: list[tuple[Batch, Tensor]] = []

    def forward(self, batch: Batch, forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # type: ignore[override]
        self.logps.append((batch, policy.logps(batch, forward_out)))
        return forward_out.sum() * 0, batch.valid_P.sum().int(), {}

    def reduce(self, losses_reduced_per_micro_batch: Any) -> Tensor:
        return torch.zeros(())


def step_kwargs(batches: list[Batch]) -> dict[str, int]:
    """Build Megatron's step arguments; except with interleaved stages, micro-batches may differ from the first."""
    rows, length = batches[0].tokens_RT.shape
    return {"num_microbatches": len(batches), "micro_batch_size": rows, "seq_length": length}


def score_batches(trainer: Any, batches: list[Batch]) -> list[tuple[Batch, Tensor]]:
    """Pair the micro-batches of one global batch with their log-probabilities, `[P, K]` nats.

    Every rank must call; only ranks of the last pipeline stage get a non-empty list. The forward pass is the same as in
    training, without dropout.
    """
    model, collector = trainer.strategy.megatron_parallel, _LogprobCollector()
    with _eval_mode(model), torch.no_grad(), trainer.precision_plugin.val_step_context():
        model.validation_step(iter(batches), loss_reduction=collector, step_i=SCORING, **step_kwargs(batches))
    return collector.logps


def score_split(trainer: Any, data: AlignDataModule, split: Split) -> Tensor:
    """Compute the log-probabilities of all responses of a split, `[rows, K]` float32 nats, on every rank.

    Scoring does not change the random numbers of later steps, as in a run with cached scores (TRL's issue 7083).
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        return _score_split(trainer, data, split)


def _score_split(trainer: Any, data: AlignDataModule, split: Split) -> Tensor:
    # DataLoader draws its workers' seed from torch's generator.
    loader = trainer.strategy.process_dataloader(data.scoring_dataloader(split))
    rows = data.datasets[split]
    # The last column counts the ranks that scored a row: all tensor-parallel ranks do.
    total = torch.zeros(len(rows), len(rows[0].responses) + 1, dtype=torch.float64)
    for batches in tqdm(
        loader, f"Reference of {split}", unit="batch", disable=not trainer.is_global_zero, file=messages()
    ):
        for callback in trainer.callbacks:
            getattr(callback, "on_scoring_batch_end", _nothing)(trainer)
        for batch, logp_PK in score_batches(trainer, batches):
            valid = batch.valid_P.bool()
            values = torch.cat([logp_PK, torch.ones_like(logp_PK[:, :1])], dim=1)
            total[batch.index_P[valid].cpu()] = values[valid].double().cpu()
    total = total.to(communication_device())
    torch.distributed.all_reduce(total)
    total = total.cpu()
    assert bool((total[:, -1] > 0).all()), "a row was not scored"
    return (total[:, :-1] / total[:, -1:]).float()


def _nothing(trainer: Any) -> None:
    return None


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    chunks = list(model)
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
