"""Findings and statistics from the table of rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aligner.data import sources
from aligner.data.batch import sequence_tokens
from aligner.data.chat_template import TemplateSettings
from aligner.data.forms import form as forms
from aligner.data.forms.table import Reader
from aligner.data.packing import fill, pack
from aligner.data.token_cache import map_chunks
from aligner.data.tokenization import ResponseTokenizer
from aligner.lint.row_table import MARKS, Bad, RowTable, row_table_maker
from aligner.lint.rules import Finding, LintReport

SHOWN = 10
"""Maximum number of lines per finding."""


@dataclass(frozen=True)
class Options:
    """Training settings that findings and statistics depend on."""

    seq_length: int = 2048
    micro_batch_size: int = 8
    global_batch_size: int = 256
    apply_chat_template: bool = False
    template: TemplateSettings = field(default_factory=TemplateSettings)
    forms: forms.Options = field(default_factory=forms.Options)
    assumed_batch: bool = False
    """Whether nobody gave `global_batch_size`; it is then the recipes', and too few rows for it are no error yet."""


def lint(train: Any, hf: Any, *, options: Options, validation: Any = None) -> list[LintReport]:
    """Lint the training and validation rows; return one report per split.

    Raises:
        RowError: a file is missing, or a folder contains no data file.
        ConfigError: `train` or `validation` has an invalid form.
    """
    report, table = _lint_split("train", train, hf, options, None)
    return [report] if not validation else [report, _lint_split("validation", validation, hf, options, table)[0]]


def _lint_split(
    split: str, source: Any, hf: Any, options: Options, training: pd.DataFrame | None
) -> tuple[LintReport, pd.DataFrame]:
    paths = [part.path for part in sources.resolve_files(source, split)]
    readers = [sources.reader_of(path, options.forms, skip_bad=True) for path in paths]
    tables = [_table(path, hf, options, reader) for path, reader in zip(paths, readers, strict=True)]
    table = pd.concat([pd.DataFrame(t.columns).assign(file=i) for i, t in enumerate(tables)], ignore_index=True)
    report = LintReport(split, [str(path) for path in paths])
    linter = Linter(report, table, paths, options)
    encode = ResponseTokenizer(hf, apply_chat_template=options.apply_chat_template, template=options.template)
    for path, reader, one in zip(paths, readers, tables, strict=True):
        linter.add_file(path, reader, one, encode)
    linter.find([t.bad for t in tables], training)
    return report, table


def _table(path: Path, hf: Any, options: Options, reader: Reader) -> RowTable:
    make = functools.partial(row_table_maker, hf, options.apply_chat_template, options.template, reader)
    return RowTable.concat(list(map_chunks(path, make, f"Lint of {path.name}", reader=reader)))


class Linter:
    """Linter of one split: fills a report from its table of rows."""

    def __init__(self, report: LintReport, table: Any, paths: Sequence[Path], options: Options) -> None:
        self.report, self.table, self.paths, self.options = report, table, paths, options
        self.pairs = table[table.second_tokens >= 0]
        self.singles = table[table.second_tokens < 0]

    def find(self, bad: list[list[Bad]], others: Any) -> None:
        """Fill the report; `others` is the training table if this is the validation split, else None."""
        readable = len(self.table[["file", "line"]].drop_duplicates())
        self.rows = max(1, readable + sum(map(len, bad)))
        self.report.numbers |= {"rows": readable + sum(map(len, bad)), "readable": readable, "pairs": len(self.pairs)}
        if len(self.table) > readable:
            # A conversation contains one example per assistant message.
            self.report.numbers["examples"] = len(self.table)
        self._add_bad(bad)
        nonempty = set(self.table.file)
        empty = [str(path) for i, path in enumerate(self.paths) if i not in nonempty and not bad[i]]
        if empty:
            self.report.findings.append(Finding("no-rows", len(empty), 1.0, [f"{path}:1" for path in empty[:SHOWN]]))
        if len(self.table):
            self._check_forms()
            self._check_duplicates()
            self._check_rewards()
            self._check_lengths()
            self._check_marks()
            self._check_preferences()
            if others is not None:
                self._add("split-leakage", self.table[self.table.prompt.isin(others.prompt)])
                if len(others) and bool(len(self.singles)) != bool((others.second_tokens < 0).any()):
                    self._add("mixed-splits", self.table)
            elif len(self.table) < self.options.global_batch_size:
                name = "few-rows" if self.options.assumed_batch else "too-few-rows"
                detail = f"global_batch_size={self.options.global_batch_size}"
                where = [str(path) for path in self.paths[:SHOWN]]
                self.report.findings.append(Finding(name, len(self.table), 1.0, where, detail))
            self._batch_statistics()
        order = {"error": 0, "warning": 1}
        self.report.findings.sort(key=lambda f: (order[f.severity], -f.count))

    def _add(self, name: str, rows: Any, detail: str = "") -> None:
        where = [f"{self.paths[f]}:{n}" for f, n in zip(rows.file[:SHOWN], rows.line[:SHOWN], strict=True)]
        if len(rows):
            self.report.findings.append(Finding(name, len(rows), len(rows) / self.rows, where, detail))

    def _add_bad(self, bad: list[list[Bad]]) -> None:
        all_rows = [(path, row) for path, rows in zip(self.paths, bad, strict=True) for row in rows]
        for fault in dict.fromkeys(row.fault for _, row in all_rows):
            rows = [(path, row) for path, row in all_rows if row.fault == fault]
            where = [f"{path}:{row.line}" for path, row in rows[:SHOWN]]
            detail = "\n".join(row.message[:200] for _, row in rows[:SHOWN])
            self.report.findings.append(Finding(fault, len(rows), len(rows) / self.rows, where, detail))

    def _check_forms(self) -> None:
        """Check forms per file, and rewards over all files, because all pairs of a run need the same form."""
        for _, rows in self.table.groupby("file"):
            judged = rows.preferred != 0
            if (rows.second_tokens < 0).all() and judged.any():
                self._add("missing-preference", rows[~judged])
        rated = self.pairs.gap.notna()
        if rated.any():
            self._add("missing-rewards", self.pairs[~rated])

    def _check_preferences(self) -> None:
        """Check the two sides of single responses, which KTO weighs against each other."""
        judged = self.singles[self.singles.preferred != 0]
        if len(judged) < 20:
            return
        wanted, unwanted = int((judged.preferred > 0).sum()), int((judged.preferred < 0).sum())
        fewer = min(wanted, unwanted)
        if fewer < 0.1 * len(judged):
            side, weight = ("undesirable", wanted) if unwanted < wanted else ("desirable", unwanted)
            detail = f"{wanted} chosen, {unwanted} rejected"
            if fewer:
                detail += f"; loss.{side}_weight={weight / fewer:.3g} balances them"
            self._add("one-sided", judged[judged.preferred == (1 if unwanted < wanted else -1)], detail)
        if judged.prompt.nunique() == 1:
            self._add("one-prompt", judged)

    def add_file(self, path: Path, reader: Reader, table: RowTable, encode: ResponseTokenizer) -> None:
        """Add what holds for a file as a whole: the form of its rows, and what is left out of them."""
        counts, rows = table.counts, max(1, len(table.columns["line"]))
        left_out = ", ".join(f"{name} ({count} rows)" for name, count in counts.left_out.items())
        said = f"{path.name}: {reader.name}" + (f"; columns left out: {left_out}" if left_out else "")
        self.report.numbers.setdefault("forms", []).append(said)
        add = self.report.findings.append
        if counts.dropped:
            detail = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
            total = counts.dropped.total()
            add(Finding("rows-left-out", total, total / (rows + total), counts.dropped_at, detail))
        if table.templated and encode.bos and not encode.template_begins_with_bos():
            add(Finding("bos", rows, 1.0, [f"{path}:1"]))

    def _check_duplicates(self) -> None:
        exact = self.table.duplicated(["exact", "preferred"])
        self._add("duplicate", self.table[exact])
        alike = self.table.duplicated(["prompt", "first", "second", "preferred"])
        self._add("near-duplicate", self.table[alike & ~exact])
        low, high = self.pairs[["first", "second"]].min(axis=1), self.pairs[["first", "second"]].max(axis=1)
        keyed = self.pairs.assign(low=low, high=high, side=self.pairs["first"] == low)
        keyed = keyed[keyed.low != keyed.high]
        both = keyed.groupby(["prompt", "low", "high"]).side.transform("nunique") > 1
        judged = self.singles[self.singles.preferred != 0]
        conflicting = judged.groupby(["prompt", "first"]).preferred.transform("nunique") > 1
        self._add("contradiction", pd.concat([keyed[both], judged[conflicting]]))

    def _check_rewards(self) -> None:
        gap = self.pairs.gap.dropna()
        if not len(gap):
            return
        self._add("tied-rewards", self.pairs[self.pairs.gap == 0])
        self._add("inverted-rewards", self.pairs[self.pairs.gap < 0])
        self.report.numbers["reward_gap"] = _spread(gap)
        self.report.histograms["reward gap"] = _histogram(gap)

    def _check_lengths(self) -> None:
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
        accuracy = numbers["length_bias"]["accuracy_of_always_the_longer"]
        if len(self.pairs) >= 100 and accuracy > 0.8:
            detail = f"always choosing the longer response is right in {accuracy:.0%} of {len(self.pairs)} pairs"
            self._add("length-bias", self.pairs[difference > 0], detail)

    def _check_marks(self) -> None:
        names = {mark: mark.replace("_", "-") for mark in MARKS}
        for bit, mark in enumerate(MARKS):
            self._add(names[mark], self.table[self.table.marks.to_numpy() >> bit & 1 == 1])

    def _batch_statistics(self) -> None:
        """Compute padding and packing efficiency, and a global batch size that yields enough steps."""
        options, columns = self.options, ["first_tokens", "second_tokens"]
        table = self.pairs if len(self.pairs) else self.singles
        columns = columns[: 2 if len(self.pairs) else 1]
        positions = sequence_tokens(table[["prompt_tokens"]].to_numpy(), table[columns].to_numpy())
        positions = positions[(positions < options.seq_length).all(axis=1)]
        numbers = self.report.numbers
        if not len(positions):
            return
        shuffled = positions[np.random.default_rng(0).permutation(len(positions))]
        count = len(positions) // options.micro_batch_size * options.micro_batch_size or len(positions)
        micros = shuffled[:count].reshape(-1, min(options.micro_batch_size, count), shuffled.shape[1])
        padded = micros.max(axis=(1, 2)).sum() * micros.shape[1] * micros.shape[2]
        capacity = options.seq_length * positions.shape[1]
        tokens, size = shuffled.sum(axis=1), min(options.global_batch_size, len(shuffled))
        # Pack each global batch separately, as a run does; 100 global batches are a sufficient sample.
        batches = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)][:100]
        packs = sum(len(pack(batch, capacity)) for batch in batches)
        global_packs = pack(tokens, capacity)
        numbers["packing"] = {
            "padded_positions_per_token": float(padded / shuffled[:count].sum()),
            "micro_batch_size": options.micro_batch_size,
            "packed_sequence_size": capacity,
            "pack_fill": float(sum(batch.sum() for batch in batches) / (packs * capacity)),
            "examples_per_pack": sum(map(len, batches)) / packs,
            "pack_fill_ahead_of_time": fill(tokens, global_packs, capacity),
        }
        # At least 100 steps, enough for a warm-up of 10 steps and a decay.
        advised = options.global_batch_size
        while advised > options.micro_batch_size and len(positions) // advised < 100:
            advised = max(1, advised // 2 // options.micro_batch_size) * options.micro_batch_size
        numbers["global_batch"] = {
            "global_batch_size": options.global_batch_size,
            "steps_per_epoch": len(positions) // options.global_batch_size,
            "advised": advised if advised <= len(positions) else None,
            "steps_per_epoch_advised": len(positions) // advised,
        }


def _spread(values: Any) -> dict[str, float]:
    array = np.asarray(values)
    return {
        "mean": float(array.mean()),
        "p50": float(np.percentile(array, 50)),
        "p90": float(np.percentile(array, 90)),
        "max": float(array.max()),
    }


def _histogram(values: Any, *, logarithmic: bool = False, bins: int = 30) -> tuple[list[int], list[float]]:
    array = np.asarray(values, dtype=float)
    low, high = float(array.min()), float(array.max())
    if logarithmic:
        edges = np.unique(np.geomspace(max(1.0, low), max(2.0, high + 1), bins + 1).round())
    else:
        low, high = np.percentile(array, [0.5, 99.5])
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        array = array.clip(edges[0], edges[-1])
    counts, edges = np.histogram(array, edges)
    return counts.tolist(), edges.tolist()
