"""`nemo llm lint-preferences`."""

import json as to_json
import sys
from pathlib import Path
from typing import Any, Optional, Union

from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.common.files import atomic_write
from aligner.data.chat_template import TemplateSettings
from aligner.data.forms.form import Options as FormOptions
from aligner.data.forms.form import RankedPairs


def lint_preferences(
    train: Union[list[Any], str],
    tokenizer: str,
    validation: Optional[Union[list[Any], str]] = None,
    seq_length: int = 2048,
    micro_batch_size: int = 8,
    global_batch_size: Optional[int] = None,
    apply_chat_template: bool = False,
    chat_template_kwargs: Optional[dict[str, Any]] = None,
    ranked_pairs: RankedPairs = "best_worst",
    ignore_columns: Optional[list[str]] = None,
    json: Optional[str] = None,
    html: Optional[str] = None,
) -> None:
    """Check preference data for errors and warnings, and recommend batching; exit code 1 if there are errors.

    Errors stop a run, or make it learn the opposite: unreadable rows, empty or identical responses, the same pair
    preferred both ways, rewards or preferences in some rows only, too many rows over seq_length. Warnings: duplicates,
    near-identical responses, ties, length bias, validation prompts in the training data, tokens merged across the
    prompt boundary, doubled BOS and EOS, role markers and special tokens in responses. Each finding names up to ten
    lines.

    Args:
        train: file of rows (gzip and Zstandard too), folder of such files, or list of both.
        tokenizer: folder or name of a Hugging Face tokenizer, or a NeMo checkpoint or run with a tokenizer.
        validation: as train; None: no validation rows.
        seq_length: the run's data.seq_length.
        micro_batch_size: pairs per micro-batch, to estimate the gain of packing.
        global_batch_size: the run's data.global_batch_size; None: 256, as in most recipes.
        apply_chat_template: the run's data.apply_chat_template.
        chat_template_kwargs: the run's data.chat_template_kwargs.
        ranked_pairs: the run's data.ranked_pairs.
        ignore_columns: the run's data.ignore_columns.
        json: JSON file to write the report to.
        html: HTML file to write the report to, one page with plots.

    Raises:
        RowError, ConfigError: a file or the tokenizer does not exist.
    """
    from aligner.lint.linter import Options, lint
    from aligner.lint.page import page, text

    rows = FormOptions(ranked_pairs, tuple(ignore_columns or ()))
    options = Options(
        seq_length,
        micro_batch_size,
        256 if global_batch_size is None else global_batch_size,
        apply_chat_template,
        TemplateSettings(chat_template_kwargs),
        rows,
        assumed_batch=global_batch_size is None,
    )
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
