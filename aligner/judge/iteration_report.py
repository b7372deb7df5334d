"""Report of a self-rewarding iteration: counts, scores, lengths and warnings, as JSON, an HTML page and W&B metrics."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.common import html_pages
from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.data.prompts import Prompt
from aligner.generate.journal import JsonObject
from aligner.judge.selection import Candidate, Selection
from aligner.judge.templates import as_text

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

SHOWN = 12
"""Number of prompts shown with their responses."""
COLUMNS = ("role", "score", "deviation", "tokens", "ended", "text")
"""Columns of a shown response: `role` is chosen, rejected or empty; `score` is the mean of the judgments."""
SATURATED, UNREADABLE, SCARCE, LONGER = 0.9, 0.3, 0.3, 1.5
"""Warning thresholds: fraction of judgments with the highest score; of unparsed judgments; minimum fraction of prompts
with a pair; ratio of the mean lengths of chosen and rejected responses."""


@dataclass
class IterationReport:
    """Statistics of an iteration. A stage adds rows; `write` writes the report."""

    max_score: float | None = None
    """The judge's highest score."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """`pair`, or the reason why there is no pair -> number of prompts."""
    judge_pairs: int = 0
    judge_pairs_left_out: int = 0
    compared: dict[str, float] = field(default_factory=dict)
    """Metrics of the meta-judge's comparisons."""

    def __post_init__(self) -> None:
        self._finish: Counter[str] = Counter()
        self._lengths: list[int] = []
        self._judgments: Counter[float | None] = Counter()
        self._by_choice = 0
        self._pairs: list[tuple[Candidate, Candidate]] = []
        self._scored: list[tuple[float, int]] = []
        self._speeds: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []

    # ---- input ----------------------------------------------------------------------------------------------------

    def add_response(self, row: JsonObject) -> None:
        self._finish[row["finish_reason"]] += 1
        self._lengths.append(row["num_tokens"])

    def add_speed(self, stage: str, speed: dict[str, float]) -> None:
        if speed:
            self._speeds |= {f"{stage}_per_second": speed["answers"], f"{stage}_tokens_per_second": speed["tokens"]}

    def add_judgment(self, row: JsonObject) -> None:
        self._judgments[row["score"]] += 1
        self._by_choice += row.get("by_choice", False)

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def add(self, prompt: Prompt, responses: list[Candidate], selection: Selection) -> None:
        self.count(selection.reason or "pair")
        if selection.chosen and selection.rejected:
            self._pairs.append((selection.chosen, selection.rejected))
        self._scored += [(response.score, response.length) for response in responses if response.scores]
        if len(self.samples) < SHOWN:
            shown = [_shown(response, selection) for response in responses]
            self.samples.append({"prompt": as_text(prompt.prompt), "reason": selection.reason, "answers": shown})

    # ---- output ---------------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> int:
        return self.outcomes.total()

    @property
    def pairs(self) -> int:
        return self.outcomes["pair"]

    def why(self) -> str:
        """Return the number of prompts per outcome, as a sentence."""
        texts = {
            "pair": "give a pair",
            "unended": "have fewer than two complete responses",
            "unparsed": "have fewer than two responses with a score",
            "identical": "have identical responses",
            "tied": "have equal scores alone",
            "unscored": "have no complete response with a score",
            "below": "have none that is good enough",
        }
        return ", ".join(f"{count} {texts.get(name, name)}" for name, count in self.outcomes.most_common())

    def metrics(self) -> dict[str, float]:
        """Return the metrics; a metric without data is left out."""
        num_judgments = self._judgments.total()
        metrics: dict[str, float] = {
            "prompts": self.prompts,
            "pairs": self.pairs,
            "prompts_without_pair": self.prompts - self.pairs,
            "answers": self._finish.total(),
            "unfinished_responses": self._finish.total() - self._finish["stop"],
            "answer_lengths": _mean(self._lengths),
            "judge_pairs": self.judge_pairs,
            "judge_pairs_left_out": self.judge_pairs_left_out,
            **{f"dropped_{name}": count for name, count in self.outcomes.items() if name != "pair"},
            **self.compared,
            **self._speeds,
        }
        for name, part, whole in (
            ("bad_sample_fraction", self.prompts - self.pairs, self.prompts),
            ("bad_end_fraction", metrics["unfinished_responses"], self._finish.total()),
        ):
            if whole:
                metrics[name] = part / whole
        if self.judge_pairs:
            metrics["judge_pair_fraction"] = self.judge_pairs / (self.judge_pairs + self.pairs)
        if num_judgments:
            parsed = {score: count for score, count in self._judgments.items() if score is not None}
            metrics["judgments"], metrics["unparsed_judgments"] = num_judgments, self._judgments[None]
            metrics["judgments_by_choice"] = self._by_choice
            metrics["score_mean"] = sum(s * n for s, n in parsed.items()) / max(1, sum(parsed.values()))
            metrics["max_score_fraction"] = (
                parsed.get(self.max_score, 0) / max(1, sum(parsed.values())) if self.max_score else 0.0
            )
        if self._pairs:
            for i, side in enumerate(("chosen", "rejected")):
                metrics[f"{side}_generated_rewards"] = _mean([pair[i].score for pair in self._pairs])
                metrics[f"{side}_lengths"] = _mean([pair[i].length for pair in self._pairs])
        if len({s for s, _ in self._scored}) > 1 and len({n for _, n in self._scored}) > 1:
            metrics["length_bias"] = statistics.correlation(*zip(*self._scored, strict=True))
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def warnings(self) -> list[str]:
        """Return warnings to check before the next iteration."""
        metrics, warnings = self.metrics(), []
        num_judgments = metrics.get("judgments", 0)
        if num_judgments and metrics["unparsed_judgments"] > UNREADABLE * num_judgments:
            warnings.append(
                f"{metrics['unparsed_judgments']:.0f} of {num_judgments:.0f} judgments have no score that can be "
                "parsed; read some of them and change the judge's template or pattern"
            )
        if num_judgments and metrics["judgments_by_choice"] > UNREADABLE * num_judgments:
            warnings.append(
                f"{metrics['judgments_by_choice']:.0f} of {num_judgments:.0f} judgments ended without a score, and got "
                "the likeliest one; read some of them and change the judge's template, or set "
                "judge.response_format=text"
            )
        if metrics.get("max_score_fraction", 0) > SATURATED:
            warnings.append(
                f"the judge gives its highest score {metrics['max_score_fraction']:.0%} of the time, so scores hardly "
                "separate responses"
            )
        if metrics["pairs"] < SCARCE * metrics["prompts"]:
            warnings.append(f"few prompts give a pair: {self.why()}")
        if metrics.get("chosen_lengths", 0) > LONGER * metrics.get("rejected_lengths", math.inf):
            warnings.append(
                f"chosen responses are {metrics['chosen_lengths'] / metrics['rejected_lengths']:.1f} times as long as "
                "rejected ones; raise length_control"
            )
        return warnings

    def scores(self) -> dict[str, int]:
        """Return the number of judgments per score, unparsed judgments last."""
        parsed = sorted((score, count) for score, count in self._judgments.items() if score is not None)
        num_unparsed = self._judgments[None]
        return {f"{score:g}": count for score, count in parsed} | ({"unread": num_unparsed} if num_unparsed else {})

    def write(self, output: Path) -> None:
        """Write `output.report.json` and `output.report.html`; log the warnings."""
        report = {
            "metrics": self.metrics(),
            "warnings": self.warnings(),
            "outcomes": dict(self.outcomes),
            "scores": self.scores(),
            "samples": self.samples,
        }
        content = json.dumps(report, indent=1, ensure_ascii=False)
        for name, text in (("json", content), ("html", page(f"{output.parent.name}: {output.name}", self))):
            with atomic_write(_file(output, name)) as partial:
                partial.write_text(text)
        log_rank0(f"{output.name}: {self.why()}")
        for warning in self.warnings():
            log_rank0(f"{output.name}: WARNING: {warning}")


def log_iteration(logger: WandbLogger, train: Any) -> None:
    """Log the report of a run's training rows to its W&B run: metrics, and a table of responses with their scores.

    Rows without a report log nothing.
    """
    file = _file(Path(train).expanduser(), "json") if isinstance(train, str) else None
    if file is None or not file.is_file():
        return
    report = json.loads(file.read_text())
    logger.log_metrics({f"iteration/{name}": value for name, value in report["metrics"].items()}, step=0)
    rows = [
        [sample["prompt"], *(response[name] for name in COLUMNS)]
        for sample in report.get("samples", ())
        for response in sample["answers"]
    ]
    if rows:
        logger.log_table("iteration/answers", columns=["prompt", *COLUMNS], data=rows)


def _file(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.name}.report.{kind}")


def _shown(response: Candidate, selection: Selection) -> dict[str, Any]:
    """Return the report's entry for a response."""
    roles = {side.key: role for role, side in (("chosen", selection.chosen), ("rejected", selection.rejected)) if side}
    return {
        "role": roles.get(response.key, ""),
        "score": response.score if response.scores else None,
        "deviation": math.sqrt(response.variance) if response.scores else None,
        "tokens": response.length,
        "ended": response.ended,
        "text": response.text,
    }


def _mean(values: list[Any]) -> float:
    return statistics.fmean(values) if values else math.nan


# ---- HTML page ----------------------------------------------------------------------------------------------------

BLUE = "#2f6f9f"
TEMPLATE = Path(__file__).with_name("iteration_report.html")


def page(title: str, report: IterationReport) -> str:
    """Render the report: metrics, warnings, score histogram, and responses to some prompts."""
    return html_pages.render(
        TEMPLATE,
        title=title,
        why=report.why(),
        warnings=report.warnings(),
        numbers=[(name, f"{value:.4g}") for name, value in report.metrics().items()],
        plot=_plot(report.scores()),
        samples=report.samples,
    )


def _plot(scores: dict[str, int]) -> Any:
    """Plot the number of judgments per score, as SVG."""
    from matplotlib.figure import Figure

    if not scores:
        return ""
    figure = Figure(figsize=(5.2, 2.4), layout="constrained")
    axes: Any = figure.subplots()
    axes.bar(list(scores), list(scores.values()), color=BLUE)
    axes.set_xlabel("score")
    axes.set_ylabel("judgments")
    axes.spines[["top", "right"]].set_visible(False)
    return html_pages.svg(figure)
