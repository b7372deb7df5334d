"""What became of the prompts of a round: counts, scores, lengths, and warnings; as JSON, as a page, as metrics."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.console import say
from aligner.files import written_whole
from aligner.journal import Row
from aligner.prompts import Prompt
from aligner.round_page import page
from aligner.selection import Candidate, Selection
from aligner.templates import as_text

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

SHOWN = 12
"""Prompts whose answers are shown."""
COLUMNS = ("role", "score", "deviation", "tokens", "ended", "text")
"""Of an answer that is shown: `role` is chosen, rejected or empty, `score` the mean of its judgements."""
SATURATED, UNREADABLE, SCARCE, LONGER = 0.9, 0.3, 0.3, 1.5
"""Shares from which a warning is given: judgements that give the highest score, that cannot be read; prompts without a
pair (more than 1 - SCARCE); and how much longer chosen answers are than rejected ones."""


@dataclass
class RoundReport:
    """Fed by a stage row by row; `write` leaves its report."""

    high: float | None = None
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
        self._judgements: Counter[float | None] = Counter()
        self._pairs: list[tuple[Candidate, Candidate]] = []
        self._scored: list[tuple[float, int]] = []
        self._speeds: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []

    # ---- what it is fed -------------------------------------------------------------------------------------------

    def answered(self, row: Row) -> None:
        self._finish[row["finish"]] += 1
        self._lengths.append(row["tokens"])

    def timed(self, what: str, speed: dict[str, float]) -> None:
        if speed:
            self._speeds |= {f"{what}_per_second": speed["answers"], f"{what}_tokens_per_second": speed["tokens"]}

    def judged(self, row: Row) -> None:
        self._judgements[row["score"]] += 1

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
        judgements = self._judgements.total()
        found: dict[str, float] = {
            "prompts": self.prompts,
            "pairs": self.pairs,
            "bad_samples": self.prompts - self.pairs,
            "answers": self._finish.total(),
            "bad_ends": self._finish.total() - self._finish["stop"],
            "answer_lengths": _mean(self._lengths),
            "judge_pairs": self.judge_pairs,
            "judge_pairs_left_out": self.judge_pairs_left_out,
            **{f"dropped_{name}": count for name, count in self.outcomes.items() if name != "pair"},
            **self.compared,
            **self._speeds,
        }
        if self.judge_pairs:
            found["judge_pair_share"] = self.judge_pairs / (self.judge_pairs + self.pairs)
        if judgements:
            read = {score: count for score, count in self._judgements.items() if score is not None}
            found["judgements"], found["unread_judgements"] = judgements, self._judgements[None]
            found["score_mean"] = sum(s * n for s, n in read.items()) / max(1, sum(read.values()))
            found["highest_score_share"] = read.get(self.high, 0) / max(1, sum(read.values())) if self.high else 0.0
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
        judged = found.get("judgements", 0)
        if judged and found["unread_judgements"] > UNREADABLE * judged:
            said.append(
                f"{found['unread_judgements']:.0f} of {judged:.0f} judgements state no score that can be read; look at "
                "them, and change the judge's template or pattern"
            )
        if found.get("highest_score_share", 0) > SATURATED:
            said.append(
                f"the judge gives its highest score {found['highest_score_share']:.0%} of the time, and tells answers "
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
        """Judgements by score, those that could not be read last."""
        read = sorted((score, count) for score, count in self._judgements.items() if score is not None)
        unread = self._judgements[None]
        return {f"{score:g}": count for score, count in read} | ({"unread": unread} if unread else {})

    def write(self, output: Path) -> None:
        """`output.report.json` and `output.report.html`, and the warnings on the screen."""
        told = {"metrics": self.metrics(), "warnings": self.warnings(), "outcomes": dict(self.outcomes)}
        shown = json.dumps(told | {"scores": self.scores(), "samples": self.samples}, indent=1, ensure_ascii=False)
        for name, text in (("json", shown), ("html", page(f"{output.parent.name}: {output.name}", self))):
            with written_whole(_file(output, name)) as partial:
                partial.write_text(text)
        say(f"{output.name}: {self.why()}")
        for warning in self.warnings():
            say(f"{output.name}: WARNING: {warning}")


def log_round(logger: WandbLogger, train: Any) -> None:
    """Show the round that made a run's rows in its W&B run: numbers, and a table of answers with their scores.

    Nothing for rows that no round made.
    """
    held = _file(Path(train).expanduser(), "json") if isinstance(train, str) else None
    if held is None or not held.is_file():
        return
    told = json.loads(held.read_text())
    logger.log_metrics({f"round/{name}": value for name, value in told["metrics"].items()}, step=0)
    rows = [[one["prompt"], *(a[name] for name in COLUMNS)] for one in told.get("samples", ()) for a in one["answers"]]
    if rows:
        logger.log_table("round/answers", columns=["prompt", *COLUMNS], data=rows)


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
