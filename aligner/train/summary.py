"""Summaries of a run: its data at the start, a table of first and last metrics at the end."""

from __future__ import annotations

from pathlib import Path

import torch

from aligner.common.console import log_rank0
from aligner.common.run_folder import read_metrics
from aligner.train import config_checks
from aligner.train.arguments import RunArguments

ROWS = {
    "loss": "loss",
    "accuracy": "acc",
    "margin": "rewards_margin_mean",
    "chosen reward": "rewards_chosen_mean",
    "rejected reward": "rewards_rejected_mean",
    "log p(chosen)": "logps_chosen_mean",
    "log p(rejected)": "logps_rejected_mean",
}


def final_table(run: Path) -> str:
    """Format first and last metrics of a run, on held-out pairs if there are any, and the path of its checkpoints."""
    measured = read_metrics(run / "metrics.csv")
    split = "val" if any("val/loss" in row for row in measured) else "train"
    rows = [row for row in measured if f"{split}/loss" in row]
    if not rows:
        return f"{run}: nothing measured yet"
    first, last = rows[0], rows[-1]
    title = "held-out pairs" if split == "val" else "training pairs"
    head = f"{title:<18}{'step ' + str(int(first['step'])):>12}{'step ' + str(int(last['step'])):>12}"
    lines = [head, "-" * len(head)]
    for name, metric in ROWS.items():
        key = f"{split}/{metric}"
        if key in first and key in last:
            lines.append(f"{name:<18}{first[key]:>12.4f}{last[key]:>12.4f}")
    return "\n".join(
        [
            "",
            *lines,
            "-" * len(head),
            f"checkpoints  {run / 'checkpoints'}",
            f"metrics      {run / 'metrics.csv'}",
        ]
    )


def log_data_summary(arguments: RunArguments) -> None:
    """Log the rows of each split and how they are batched."""
    data, objective = arguments.data, arguments.objective
    for split, corpus in data.datasets.items():
        report = corpus.report
        log_rank0(f"{split}: {report}")
        if report.kind == "pairs" and not report.with_rewards and "chosen_reward" in objective.required_fields:
            target = torch.sigmoid(torch.tensor(objective.reward_scale)).item()
            log_rank0(
                f"{split}: no row has chosen_reward and rejected_reward, so every pair gets 1 and 0. "
                "A gap that is the same everywhere says nothing of pairs; under rpo_bwd_kl it is label smoothing "
                f"with the target {target:.3f}"
            )
    left, noun = data.num_samples("train") % data.global_batch_size, "packs" if "train" in data.packs else "examples"
    if left:
        log_rank0(left_out(arguments, data.num_samples("train"), noun, by_turns=not data.order.weights))
    if data.batching == "packed" and noun == "examples":
        _log_packs(arguments)
    if arguments.preference_loss_weight and arguments.reference is not None and not objective.needs_reference:
        log_rank0("reference: not prepared, the loss reads none")


def left_out(arguments: RunArguments, samples: int, noun: str, *, by_turns: bool) -> str:
    """Say how many samples do not fill a last global batch, and what would use more of them if they are many."""
    data, left = arguments.data, samples % arguments.data.global_batch_size
    text = f"train: {left} of {samples} {noun} do not fill a last global batch and sit out each epoch"
    text += ", by turns" if by_turns else ""
    per_pass = config_checks.examples_per_pass(arguments)
    better = samples // (samples // data.global_batch_size + 1) // per_pass * per_pass
    if left > 0.1 * samples and better and samples % better < left:
        text += f"; data.global_batch_size={better} leaves out {samples % better}"
    return text


def _log_packs(arguments: RunArguments) -> None:
    splitter = arguments.data.cutting("train")
    packs = splitter(arguments.data.global_batch(0), 1)[0]
    capacity = splitter.micro_batch_size * splitter.packed_sequence_size
    tokens = sum(int(splitter.tokens[row]) for pack in packs for row, _ in pack)
    log_rank0(
        f"train: the first global batch makes {len(packs)} micro-batches of up to {capacity} tokens, "
        f"{tokens / (len(packs) * capacity):.0%} full; data.packed_sequence_size sets how many tokens these are"
    )
