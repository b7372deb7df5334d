"""What became of the prompts of a round: counts, scores, lengths, and warnings; as JSON, as a page, as metrics."""

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
"""Prompts whose answers are shown."""
COLUMNS = ("role", "score", "deviation", "tokens", "ended", "text")
"""Of an answer that is shown: `role` is chosen, rejected or empty, `score` the mean of its judgments."""
SATURATED, UNREADABLE, SCARCE, LONGER = 0.9, 0.3, 0.3, 1.5
"""Shares from which a warning is given: judgments that give the highest score, that cannot be read; prompts without a
pair (more than 1 - SCARCE); and how much longer chosen answers are than rejected ones."""


@dataclass
class IterationReport:
    """Fed by a stage row by row; `write` leaves its report."""

    max_score: float | None = None
    """The judge's highest score."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """`pair`, or the reason why there is none -> prompts."""
    judge_pairs: int = 0
    judge_pairs_left_out: int = 0
    compared: dict[str, float] = field(default_factory=dict)
    """What the meta-judge told of its comparisons."""

    def __post_init__(self) -> None:
        self._finish: Counter[str] = Counter()
        self._lengths: list[int] = []
        self._judgments: Counter[float | None] = Counter()
        self._pairs: list[tuple[Candidate, Candidate]] = []
        self._scored: list[tuple[float, int]] = []
        self._speeds: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []

    # ---- what it is fed -------------------------------------------------------------------------------------------

    def answered(self, row: JsonObject) -> None:
        self._finish[row["finish_reason"]] += 1
        self._lengths.append(row["num_tokens"])

    def timed(self, what: str, speed: dict[str, float]) -> None:
        if speed:
            self._speeds |= {f"{what}_per_second": speed["answers"], f"{what}_tokens_per_second": speed["tokens"]}

    def judged(self, row: JsonObject) -> None:
        self._judgments[row["score"]] += 1

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def add(self, prompt: Prompt, answers: list[Candidate], found: Selection) -> None:
        self.count(found.reason or "pair")
        if found.chosen and found.rejected:
            self._pairs.append((found.chosen, found.rejected))
        self._scored += [(answer.score, answer.length) for answer in answers if answer.scores]
        if len(self.samples) < SHOWN:
            shown = [_shown(answer, found) for answer in answers]
            self.samples.append({"prompt": as_text(prompt.prompt), "reason": found.reason, "answers": shown})

    # ---- what it says ---------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> int:
        return self.outcomes.total()

    @property
    def pairs(self) -> int:
        return self.outcomes["pair"]

    def why(self) -> str:
        """Prompts by what became of them."""
        told = {
            "pair": "give a pair", "unended": "have fewer than two answers that ended",
            "unparsed": "have fewer than two scores that could be read", "identical": "have one answer several times",
            "tied": "have equal scores alone", "unscored": "have no answer that ended and has a score",
            "below": "have none that is good enough",
        }  # fmt: skip
        return ", ".join(f"{count} {told.get(name, name)}" for name, count in self.outcomes.most_common())

    def metrics(self) -> dict[str, float]:
        """Named numbers; those that there is nothing for are left out."""
        judgments = self._judgments.total()
        found: dict[str, float] = {
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
        if self.judge_pairs:
            found["judge_pair_fraction"] = self.judge_pairs / (self.judge_pairs + self.pairs)
        if judgments:
            read = {score: count for score, count in self._judgments.items() if score is not None}
            found["judgments"], found["unparsed_judgments"] = judgments, self._judgments[None]
            found["score_mean"] = sum(s * n for s, n in read.items()) / max(1, sum(read.values()))
            found["max_score_fraction"] = (
                read.get(self.max_score, 0) / max(1, sum(read.values())) if self.max_score else 0.0
            )
        if self._pairs:
            for i, side in enumerate(("chosen", "rejected")):
                found[f"{side}_generated_rewards"] = _mean([pair[i].score for pair in self._pairs])
                found[f"{side}_lengths"] = _mean([pair[i].length for pair in self._pairs])
        if len({s for s, _ in self._scored}) > 1 and len({n for _, n in self._scored}) > 1:
            found["length_bias"] = statistics.correlation(*zip(*self._scored, strict=True))
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def warnings(self) -> list[str]:
        """What a user should look at before the next round."""
        found, said = self.metrics(), []
        judged = found.get("judgments", 0)
        if judged and found["unparsed_judgments"] > UNREADABLE * judged:
            said.append(
                f"{found['unparsed_judgments']:.0f} of {judged:.0f} judgments state no score that can be read; look at "
                "them, and change the judge's template or pattern"
            )
        if found.get("max_score_fraction", 0) > SATURATED:
            said.append(
                f"the judge gives its highest score {found['max_score_fraction']:.0%} of the time, and tells answers "
                "apart no more"
            )
        if found["pairs"] < SCARCE * found["prompts"]:
            said.append(f"few prompts give a pair: {self.why()}")
        if found.get("chosen_lengths", 0) > LONGER * found.get("rejected_lengths", math.inf):
            said.append(
                f"chosen answers are {found['chosen_lengths'] / found['rejected_lengths']:.1f} times as long as "
                "rejected ones; raise length_control"
            )
        return said

    def scores(self) -> dict[str, int]:
        """Judgments by score, those that could not be read last."""
        read = sorted((score, count) for score, count in self._judgments.items() if score is not None)
        unread = self._judgments[None]
        return {f"{score:g}": count for score, count in read} | ({"unread": unread} if unread else {})

    def write(self, output: Path) -> None:
        """`output.report.json` and `output.report.html`, and the warnings on the screen."""
        told = {"metrics": self.metrics(), "warnings": self.warnings(), "outcomes": dict(self.outcomes)}
        shown = json.dumps(told | {"scores": self.scores(), "samples": self.samples}, indent=1, ensure_ascii=False)
        for name, text in (("json", shown), ("html", page(f"{output.parent.name}: {output.name}", self))):
            with atomic_write(_file(output, name)) as partial:
                partial.write_text(text)
        log_rank0(f"{output.name}: {self.why()}")
        for warning in self.warnings():
            log_rank0(f"{output.name}: WARNING: {warning}")


def log_iteration(logger: WandbLogger, train: Any) -> None:
    """Show the round that made a run's rows in its W&B run: numbers, and a table of answers with their scores.

    Nothing for rows that no round made.
    """
    held = _file(Path(train).expanduser(), "json") if isinstance(train, str) else None
    if held is None or not held.is_file():
        return
    told = json.loads(held.read_text())
    logger.log_metrics({f"iteration/{name}": value for name, value in told["metrics"].items()}, step=0)
    rows = [[one["prompt"], *(a[name] for name in COLUMNS)] for one in told.get("samples", ()) for a in one["answers"]]
    if rows:
        logger.log_table("iteration/answers", columns=["prompt", *COLUMNS], data=rows)


def _file(output: Path, kind: str) -> Path:
    return output.with_name(f"{output.name}.report.{kind}")


def _shown(answer: Candidate, found: Selection) -> dict[str, Any]:
    """An answer as a report shows it."""
    roles = {side.key: role for role, side in (("chosen", found.chosen), ("rejected", found.rejected)) if side}
    return {
        "role": roles.get(answer.key, ""),
        "score": answer.score if answer.scores else None,
        "deviation": math.sqrt(answer.variance) if answer.scores else None,
        "tokens": answer.length,
        "ended": answer.ended,
        "text": answer.text,
    }


def _mean(values: list[Any]) -> float:
    return statistics.fmean(values) if values else math.nan


# ---- as a page ----------------------------------------------------------------------------------------------------

BLUE = "#2f6f9f"
TEMPLATE = Path(__file__).with_name("iteration_report.html")


def page(title: str, round: IterationReport) -> str:
    """Numbers, warnings, the judge's scores, and the answers to some prompts."""
    return html_pages.render(
        TEMPLATE,
        title=title,
        why=round.why(),
        warnings=round.warnings(),
        numbers=[(name, f"{value:.4g}") for name, value in round.metrics().items()],
        plot=_plot(round.scores()),
        samples=round.samples,
    )


def _plot(scores: dict[str, int]) -> Any:
    """Judgments by score, as SVG."""
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
