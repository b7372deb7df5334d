"""Data of a run, read from its folder: metrics, recipe, jobs, notes, sample responses."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import yaml

from aligner.common import run_folder
from aligner.common.errors import CheckpointError
from aligner.common.run_folder import read_metrics


@dataclasses.dataclass(frozen=True)
class RunData:
    """Files of a run's folder."""

    folder: Path
    metrics: list[dict[str, float]]
    recipe: dict[str, Any]
    """Content of `config.yaml`; empty if the run was built without a recipe."""
    jobs: list[dict[str, Any]]
    """`job.json` of each job, the first job first; without those that are damaged."""
    notes: list[dict[str, Any]]
    samples: list[dict[str, str]]

    @property
    def name(self) -> str:
        return self.folder.name

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric, `train/loss` for example."""
        rows = [(row["step"], row[metric]) for row in self.metrics if metric in row]
        return [step for step, _ in rows], [value for _, value in rows]

    def settings(self) -> dict[str, str]:
        """Return the flattened recipe: `loss.beta` -> `0.1`."""
        return dict(_flat(self.recipe))


def read(folder: str | Path) -> RunData:
    """Read a run's folder.

    Raises:
        CheckpointError: the folder is not a run's.
    """
    run = Path(folder).expanduser()
    metrics = read_metrics(run / run_folder.METRICS)
    if not metrics:
        raise CheckpointError(
            f"{folder}: has no metrics.csv with a line; expected the folder of a run, as runs/tiny_dpo"
        )
    recipe = run / run_folder.RECIPE
    return RunData(
        folder=run,
        metrics=metrics,
        recipe=yaml.safe_load(recipe.read_text()) if recipe.is_file() else {},
        jobs=[job for job in map(run_folder.read_job, run_folder.job_files(run)) if "machine" in job],
        notes=run_folder.read_lines(run / run_folder.PROVENANCE / run_folder.NOTES),
        samples=run_folder.read_lines(run / run_folder.SAMPLES),
    )


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        inner = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items() if key != "_partial_"]
        return [pair for inner_path, part in inner for pair in _flat(part, inner_path)]
    return [(path, str(value))]


FALL = 5.0
"""Nats by which the chosen responses may become less likely before it is told."""
GAP = 0.2
"""Accuracy on training rows above that on held-out ones that is told."""
LARGE_GRADIENT = 50.0
"""Norm of the gradient that is told; clipping at 1 is usual."""


def diagnose(run: RunData) -> list[str]:
    """List the notes of the run, failed jobs, overfitting and suspicious curves."""
    notes = (f"step {n['step']}: {n['text']}" for n in run.notes if {"step", "text"} <= n.keys())
    return [*notes, *_failed_jobs(run), *_overfitting(run), *_suspicious_curves(run)]


def _failed_jobs(run: RunData) -> list[str]:
    findings = []
    for number, job in enumerate(run.jobs, start=1):
        ended = job.get("ended")
        if ended is None and number < len(run.jobs):
            findings.append(
                f"job {number} of {len(run.jobs)} left no word of its end: it was killed, or its machine was"
            )
        elif ended and ended["status"] == "failed":
            findings.append(f"job {number} of {len(run.jobs)} failed: {ended['error']}")
    return findings


def _overfitting(run: RunData) -> list[str]:
    steps, losses = run.curve("val/loss")
    if len(losses) < 3:
        return []
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[-1] <= losses[best] * 1.05 + 1e-3:
        return []
    return [
        f"the validation loss was lowest at step {steps[best]:.0f} ({losses[best]:.4g}) and ended at {losses[-1]:.4g}: "
        "the run learned its rows by heart from there on; fewer steps, a larger beta or a lower rate "
        "(log.ckpt.monitor=val/loss keeps the best)"
    ]


def _suspicious_curves(run: RunData) -> list[str]:
    findings = []
    split = "val" if run.curve("val/acc")[1] else "train"
    accuracy = run.curve(f"{split}/acc")[1]
    findings += _falling(run, split)
    if len(accuracy) >= 3 and accuracy[-1] <= 0.52:
        findings.append(
            f"accuracy ended at {accuracy[-1]:.2f}: chance; more steps, a higher rate, or rows that can be told"
        )
    trained, held_out = run.curve("train/acc")[1][-10:], run.curve("val/acc")[1]
    if len(held_out) >= 2 and len(trained) >= 2 and statistics.fmean(trained) > held_out[-1] + GAP:
        findings.append(
            f"accuracy is {statistics.fmean(trained):.2f} on training rows and {held_out[-1]:.2f} on held-out ones: "
            "the run learned its rows by heart; more rows, fewer steps, a larger beta or a lower rate"
        )
    norms = run.curve("train/grad_norm")[1]
    typical = statistics.median(norms[len(norms) // 2 :]) if norms else 0.0
    if typical > LARGE_GRADIENT:
        findings.append(
            f"the gradient's norm is {typical:.3g} in the second half: every step is cut to optim.config.clip_grad, "
            "and its direction may be that of a few rows; lower the rate or beta (an IPO loss of long responses needs "
            "average_log_probs=True)"
        )
    return findings


def _falling(run: RunData, split: str) -> list[str]:
    """Tell of chosen responses that became less likely, more than their fall explains of a growing margin."""
    chosen, rejected = (run.curve(f"{split}/logps_{side}_mean")[1] for side in ("chosen", "rejected"))
    lengths = run.curve(f"{split}/chosen_lengths")[1]
    if min(len(chosen), len(rejected)) < 3:
        return []
    fall = chosen[0] - chosen[-1]
    growth = fall + (chosen[-1] - rejected[-1]) - (chosen[0] - rejected[0])
    if fall < FALL and not (fall > 1 and fall > 0.25 * growth):
        return []
    per_token = f", {fall / statistics.fmean(lengths):.2g} a token" if lengths else ""
    return [
        f"log p of the chosen responses fell from {chosen[0]:.4g} to {chosen[-1]:.4g} nats ({fall:.3g}{per_token}), of "
        f"the rejected ones from {rejected[0]:.4g} to {rejected[-1]:.4g}: a pair's loss sees the difference alone "
        "(docs/losses.md, 'Why the chosen log-probability falls'); sft_loss_weight holds the chosen ones up"
    ]
