"""`nemo llm lint-preferences`."""

import json as to_json
import sys
from pathlib import Path
from typing import Any, Optional, Union

from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.common.files import atomic_write


def lint_preferences(
    train: Union[list[Any], str],
    tokenizer: str,
    validation: Optional[Union[list[Any], str]] = None,
    seq_length: int = 2048,
    micro_batch_size: int = 8,
    global_batch_size: int = 256,
    apply_chat_template: bool = False,
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
        apply_chat_template: the run's data.apply_chat_template.
        json: file to write the report to, for programs.
        html: file to write the report to, one page with plots.

    Raises:
        RowError, ConfigError: there are no such files, or no such tokenizer.
    """
    from aligner.lint.linter import Options, lint
    from aligner.lint.page import page, text

    options = Options(seq_length, micro_batch_size, global_batch_size, apply_chat_template)
    reports = lint(train, named_tokenizer(tokenizer), options=options, validation=validation)
    print("\n\n".join(map(text, reports)))
    if json:
        _write(json, to_json.dumps([report.as_dict() for report in reports], indent=1, allow_nan=False))
    if html:
        _write(html, page(reports))
    if any(report.errors for report in reports):
        sys.exit(1)


def _write(name: str, content: str) -> None:
    with atomic_write(Path(name).expanduser()) as partial:
        partial.write_text(content, encoding="utf-8")
    print(f"written: {name}")
