"""From what was looked at in each row to findings and figures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aligner.data import sources
from aligner.data.batch import sequence_tokens
from aligner.data.packing import fill, pack
from aligner.data.token_cache import map_chunks
from aligner.lint.row_table import MARKS, Bad, RowTable, row_table_maker
from aligner.lint.rules import Finding, LintReport

SHOWN = 10
"""Lines named of each finding."""


@dataclass(frozen=True)
class Options:
    """What the numbers are worked out for."""

    seq_length: int = 2048
    micro_batch_size: int = 8
    global_batch_size: int = 256
    apply_chat_template: bool = False


def lint(train: Any, hf: Any, *, options: Options, validation: Any = None) -> list[LintReport]:
    """Reports on training and validation rows.

    Raises:
        RowError, ConfigError: there are no such files.
    """
    report, table = _lint("train", train, hf, options, None)
    return [report] if not validation else [report, _lint("validation", validation, hf, options, table)[0]]


def _lint(
    split: str, source: Any, hf: Any, options: Options, others: pd.DataFrame | None
) -> tuple[LintReport, pd.DataFrame]:
    paths = [part.path for part in sources.resolve_files(source, split)]
    make = functools.partial(row_table_maker, hf, options.apply_chat_template)
    facts = [RowTable.joined(list(map_chunks(path, make, f"Lint of {path.name}"))) for path in paths]
    table = pd.concat([pd.DataFrame(f.columns).assign(file=i) for i, f in enumerate(facts)], ignore_index=True)
    report = LintReport(split, [str(path) for path in paths])
    Linter(report, table, paths, options).find([f.bad for f in facts], others)
    return report, table


class Linter:
    """Goes over the table once a question."""

    def __init__(self, report: LintReport, table: Any, paths: Sequence[Path], options: Options) -> None:
        self.report, self.table, self.paths, self.options = report, table, paths, options
        self.pairs = table[table.second_tokens >= 0]
        self.singles = table[table.second_tokens < 0]

    def find(self, bad: list[list[Bad]], others: Any) -> None:
        """Fill the report; `others` are the training rows, if these are the validation's."""
        readable = len(self.table[["file", "line"]].drop_duplicates())
        self.rows = max(1, readable + sum(map(len, bad)))
        self.report.numbers |= {"rows": readable + sum(map(len, bad)), "readable": readable, "pairs": len(self.pairs)}
        if len(self.table) > readable:
            # A conversation makes an example of each of its answers.
            self.report.numbers["examples"] = len(self.table)
        self._bad(bad)
        held = set(self.table.file)
        empty = [str(path) for i, path in enumerate(self.paths) if i not in held and not bad[i]]
        if empty:
            self.report.findings.append(Finding("no-rows", len(empty), 1.0, [f"{path}:1" for path in empty[:SHOWN]]))
        if len(self.table):
            self._forms()
            self._repeats()
            self._rewards()
            self._lengths()
            self._marks()
            if others is not None:
                self._add("split-leakage", self.table[self.table.prompt.isin(others.prompt)])
                if len(others) and bool(len(self.singles)) != bool((others.second_tokens < 0).any()):
                    self._add("mixed-splits", self.table)
            elif len(self.table) < self.options.global_batch_size:
                self._add("too-few-rows", self.table, f"global_batch_size={self.options.global_batch_size}")
            self._batches()
        order = {"error": 0, "warning": 1}
        self.report.findings.sort(key=lambda f: (order[f.severity], -f.count))

    def _add(self, name: str, rows: Any, detail: str = "") -> None:
        where = [f"{self.paths[f]}:{n}" for f, n in zip(rows.file[:SHOWN], rows.line[:SHOWN], strict=True)]
        if len(rows):
            self.report.findings.append(Finding(name, len(rows), len(rows) / self.rows, where, detail))

    def _bad(self, bad: list[list[Bad]]) -> None:
        every = [(path, one) for path, found in zip(self.paths, bad, strict=True) for one in found]
        for fault in dict.fromkeys(one.fault for _, one in every):
            these = [(path, one) for path, one in every if one.fault == fault]
            where = [f"{path}:{one.line}" for path, one in these[:SHOWN]]
            detail = "\n".join(one.message[:200] for _, one in these[:SHOWN])
            self.report.findings.append(Finding(fault, len(these), len(these) / self.rows, where, detail))

    def _forms(self) -> None:
        """Within each file; rewards across files, too, since the pairs of a run must have them alike."""
        mixed, unjudged = [], []
        for _, rows in self.table.groupby("file"):
            single = rows.second_tokens < 0
            if single.any() and not single.all():
                mixed.append(rows[single] if single.mean() <= 0.5 else rows[~single])
            judged = rows.preferred != 0
            if single.all() and judged.any():
                unjudged.append(rows[~judged])
        for name, found in (("mixed-forms", mixed), ("missing-preference", unjudged)):
            if found:
                self._add(name, pd.concat(found))
        rated = self.pairs.gap.notna()
        if rated.any():
            self._add("missing-rewards", self.pairs[~rated])

    def _repeats(self) -> None:
        exact = self.table.duplicated(["exact", "preferred"])
        self._add("duplicate", self.table[exact])
        alike = self.table.duplicated(["prompt", "first", "second", "preferred"])
        self._add("near-duplicate", self.table[alike & ~exact])
        low, high = self.pairs[["first", "second"]].min(axis=1), self.pairs[["first", "second"]].max(axis=1)
        keyed = self.pairs.assign(low=low, high=high, side=self.pairs["first"] == low)
        keyed = keyed[keyed.low != keyed.high]
        both = keyed.groupby(["prompt", "low", "high"]).side.transform("nunique") > 1
        judged = self.singles[self.singles.preferred != 0]
        ways = judged.groupby(["prompt", "first"]).preferred.transform("nunique") > 1
        self._add("contradiction", pd.concat([keyed[both], judged[ways]]))

    def _rewards(self) -> None:
        gap = self.pairs.gap.dropna()
        if not len(gap):
            return
        self._add("tied-rewards", self.pairs[self.pairs.gap == 0])
        self._add("inverted-rewards", self.pairs[self.pairs.gap < 0])
        self.report.numbers["reward_gap"] = _spread(gap)
        self.report.histograms["reward gap"] = _histogram(gap)

    def _lengths(self) -> None:
        table, limit = self.table, self.options.seq_length
        longest = table.prompt_tokens + table[["first_tokens", "second_tokens"]].max(axis=1)
        over = table[longest > limit]
        name = "too-many-overlong" if len(over) > 0.1 * len(table) else "overlong"
        self._add(name, over, f"seq_length={limit}; the longest has {int(longest.max())} tokens")
        numbers = self.report.numbers
        name, answers = ("chosen", self.pairs) if len(self.pairs) else ("response", table)
        numbers["tokens"] = {
            "prompt": _spread(table.prompt_tokens),
            name: _spread(answers.first_tokens),
            **({"rejected": _spread(self.pairs.second_tokens)} if len(self.pairs) else {}),
            "longest sequence of a row": _spread(longest),
        }
        numbers["overlong_fraction"] = len(over) / len(table)
        self.report.histograms["tokens of a row's longest sequence"] = _histogram(longest, logarithmic=True)
        if not len(self.pairs):
            return
        difference = self.pairs.first_tokens - self.pairs.second_tokens
        longer, shorter = float((difference > 0).mean()), float((difference < 0).mean())
        numbers["length_bias"] = {
            "chosen_longer": longer,
            "rejected_longer": shorter,
            "accuracy_of_always_the_longer": longer + (1 - longer - shorter) / 2,
            "mean_tokens_chosen_minus_rejected": float(difference.mean()),
        }
        self.report.histograms["tokens of chosen minus rejected"] = _histogram(difference)
        strong = numbers["length_bias"]["accuracy_of_always_the_longer"]
        if len(self.pairs) >= 100 and strong > 0.8:
            detail = f"always taking the longer answer is right in {strong:.0%} of {len(self.pairs)} pairs"
            self._add("length-bias", self.pairs[difference > 0], detail)

    def _marks(self) -> None:
        names = {mark: mark.replace("_", "-") for mark in MARKS}
        for bit, mark in enumerate(MARKS):
            self._add(names[mark], self.table[self.table.marks.to_numpy() >> bit & 1 == 1])

    def _batches(self) -> None:
        """What packing would gain, and how large a global batch the rows are enough for."""
        options, columns = self.options, ["first_tokens", "second_tokens"]
        table = self.pairs if len(self.pairs) else self.singles
        columns = columns[: 2 if len(self.pairs) else 1]
        places = sequence_tokens(table[["prompt_tokens"]].to_numpy(), table[columns].to_numpy())
        places = places[(places < options.seq_length).all(axis=1)]
        numbers = self.report.numbers
        if not len(places):
            return
        drawn = places[np.random.default_rng(0).permutation(len(places))]
        count = len(places) // options.micro_batch_size * options.micro_batch_size or len(places)
        cut = drawn[:count].reshape(-1, min(options.micro_batch_size, count), drawn.shape[1])
        padded = cut.max(axis=(1, 2)).sum() * cut.shape[1] * cut.shape[2]
        capacity = options.seq_length * places.shape[1]
        tokens, size = drawn.sum(axis=1), min(options.global_batch_size, len(drawn))
        # As a run packs: each global batch for itself. A hundred of them say enough.
        batches = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)][:100]
        packs = sum(len(pack(batch, capacity)) for batch in batches)
        whole = pack(tokens, capacity)
        numbers["packing"] = {
            "padded_positions_per_token": float(padded / drawn[:count].sum()),
            "micro_batch_size": options.micro_batch_size,
            "packed_sequence_size": capacity,
            "pack_fill": float(sum(batch.sum() for batch in batches) / (packs * capacity)),
            "examples_per_pack": sum(map(len, batches)) / packs,
            "pack_fill_ahead_of_time": fill(tokens, whole, capacity),
        }
        # 100 steps are what a warm-up of 10 and a decay are worth.
        advised = options.global_batch_size
        while advised > options.micro_batch_size and len(places) // advised < 100:
            advised = max(1, advised // 2 // options.micro_batch_size) * options.micro_batch_size
        numbers["global_batch"] = {
            "global_batch_size": options.global_batch_size,
            "steps_per_epoch": len(places) // options.global_batch_size,
            "advised": advised if advised <= len(places) else None,
            "steps_per_epoch_advised": len(places) // advised,
        }


def _spread(values: Any) -> dict[str, float]:
    found = np.asarray(values)
    return {
        "mean": float(found.mean()),
        "p50": float(np.percentile(found, 50)),
        "p90": float(np.percentile(found, 90)),
        "max": float(found.max()),
    }


def _histogram(values: Any, *, logarithmic: bool = False, bins: int = 30) -> tuple[list[int], list[float]]:
    found = np.asarray(values, dtype=float)
    low, high = float(found.min()), float(found.max())
    if logarithmic:
        edges = np.unique(np.geomspace(max(1.0, low), max(2.0, high + 1), bins + 1).round())
    else:
        low, high = np.percentile(found, [0.5, 99.5])
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        found = found.clip(edges[0], edges[-1])
    counts, edges = np.histogram(found, edges)
    return counts.tolist(), edges.tolist()
