"""`nemo llm lint-preferences`: what is wrong, odd or worth knowing about preference data, before any GPU is spent."""

import functools
import json as to_json
import sys
from pathlib import Path
from typing import Any, Optional, Union

import pandas as pd

from aligner import sources
from aligner.cache import over_chunks
from aligner.files import written_whole
from aligner.lint_facts import Facts, looker
from aligner.lint_finder import Finder, Options
from aligner.lint_findings import LintReport


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
    paths = [part.path for part in sources.parts(source, split)]
    make = functools.partial(looker, hf, options.as_chat)
    facts = [Facts.joined(list(over_chunks(path, make, f"Lint of {path.name}"))) for path in paths]
    table = pd.concat([pd.DataFrame(f.columns).assign(file=i) for i, f in enumerate(facts)], ignore_index=True)
    report = LintReport(split, [str(path) for path in paths])
    Finder(report, table, paths, options).find([f.bad for f in facts], others)
    return report, table


def lint_preferences(
    train: Union[list[Any], str],
    tokenizer: str,
    validation: Optional[Union[list[Any], str]] = None,
    seq_length: int = 2048,
    micro_batch_size: int = 8,
    global_batch_size: int = 256,
    as_chat: bool = False,
    json: Optional[str] = None,
    html: Optional[str] = None,
) -> None:
    """Look for mistakes and oddities in preference data, and say how to batch it; exit code 1 if there are errors.

    Errors are what a run would stop at, or learn the opposite from: unreadable rows, empty or identical answers, the
    same pair preferred both ways, rewards or preferences that some rows lack, too many rows over seq_length. Warnings
    are the rest: duplicates, near-identical answers, ties, length bias, validation prompts that occur in training,
    tokens merged at the prompt's border, doubled BOS and EOS, role markers and special tokens inside answers. Each
    names up to ten lines.

    Args:
        train: a file of rows (gzip and Zstandard too), a folder of them, or a list.
        tokenizer: folder or name of a Hugging Face tokenizer, or a NeMo checkpoint or run that carries one.
        validation: likewise; None: none.
        seq_length: the run's data.seq_length.
        micro_batch_size: pairs of a micro-batch, for what packing would gain.
        global_batch_size: pairs of an optimizer step, for how many of them there would be.
        as_chat: the run's data.as_chat.
        json: file to write the report to, for programs.
        html: file to write the report to, one page with plots.

    Raises:
        RowError, ConfigError: there are no such files, or no such tokenizer.
    """
    from aligner.lint_page import page, text
    from aligner.named_tokenizer import named_tokenizer

    options = Options(seq_length, micro_batch_size, global_batch_size, as_chat)
    reports = lint(train, named_tokenizer(tokenizer), options=options, validation=validation)
    print("\n\n".join(map(text, reports)))
    if json:
        _write(json, to_json.dumps([report.as_dict() for report in reports], indent=1, allow_nan=False))
    if html:
        _write(html, page(reports))
    if any(report.errors for report in reports):
        sys.exit(1)


def _write(name: str, content: str) -> None:
    with written_whole(Path(name).expanduser()) as partial:
        partial.write_text(content, encoding="utf-8")
    print(f"written: {name}")
