"""`nemo llm convert-preferences` and `nemo llm forms`."""

import json
from pathlib import Path
from typing import Any, Optional, Union

from aligner.common.errors import ConfigError
from aligner.common.files import atomic_write
from aligner.data import sources
from aligner.data.forms import table
from aligner.data.forms.form import Options, RankedPairs
from aligner.data.rows import FormatCounts, PreferenceRow, Row


def convert_preferences(
    input: Union[list[Any], str],
    output: str,
    ranked_pairs: RankedPairs = "best_worst",
    ignore_columns: Optional[list[str]] = None,
) -> Path:
    """Convert rows of any form that is read (nemo llm forms) into JSON lines of nemo-align's own.

    A pair becomes a line with prompt, chosen_response and rejected_response, and chosen_reward and rejected_reward
    where the rows have scores; a single response becomes prompt, response and preference. What is dropped (ties, equal
    or empty responses) is counted, with its reason, and columns that are not read are named.

    Args:
        input: file, folder, glob, hf://datasets/NAME, or list of these.
        output: file of JSON lines to write; must not exist.
        ranked_pairs: pairs of a ranked list: best_worst, neighbours, all.
        ignore_columns: columns to leave out though their names say that they judge or say something.

    Raises:
        RowError: a row cannot be read.
        ConfigError: an argument is invalid, or the output exists.
    """
    target = Path(output).expanduser()
    if target.exists():
        raise ConfigError(f"output: {target} exists already; remove it or name another file")
    options = Options(ranked_pairs, tuple(ignore_columns or ()))
    table.check_options(options)
    parts = sources.resolve_files(input, "input")
    if any(part.weight is not None for part in parts):
        raise ConfigError("input: has weights, which choose rows in every epoch; leave them out")
    written = 0
    with atomic_write(target) as partial, partial.open("w", encoding="utf-8") as file:
        for part in parts:
            counts = FormatCounts()
            reader = sources.reader_of(part.path, options)
            for row in sources.rows(part.path, reader, counts):
                file.write(json.dumps(as_line(row), ensure_ascii=False) + "\n")
                written += 1
            counts.check(part.path)
            _print_report(part.path, reader.name, counts)
    print(f"written: {written} rows to {output}")
    return target


def forms(name: Optional[str] = None) -> None:
    """List the forms of rows that are read: their keys, where they are known from, and an example.

    Args:
        name: one form, to show its example alone.

    Raises:
        ConfigError: there is no such form.
    """
    known = table.BY_NAME
    if name is not None and name not in known:
        raise ConfigError(f"name: {name!r} is no form; there are: {', '.join(known)}")
    for form in known.values() if name is None else [known[name]]:
        examples = form.example if isinstance(form.example, list) else [form.example]
        optional = f" [{' '.join(sorted(form.reads))}]" if form.reads else ""
        print(f"{form.name}  ({form.known_from})\n  {' '.join(sorted(form.needs))}{optional}")
        print("".join(f"    {json.dumps(example, ensure_ascii=False)}\n" for example in examples))


def as_line(row: Row) -> dict[str, Any]:
    """Return a row in nemo-align's own form."""
    template = dict(row.template)
    tools = template.pop("tools", None)
    more = {"tools": tools, "chat_template_kwargs": template or None}
    if isinstance(row, PreferenceRow):
        answers = {"chosen_response": row.chosen_response, "rejected_response": row.rejected_response}
        more |= {"chosen_reward": row.chosen_reward, "rejected_reward": row.rejected_reward}
    else:
        answers = {"response": row.response}
        more |= {"preference": None if row.desirable is None else "chosen" if row.desirable else "rejected"}
    return {"prompt": row.prompt, **answers, **{key: value for key, value in more.items() if value is not None}}


def _print_report(path: Path, form: str, counts: FormatCounts) -> None:
    noun = "pairs" if counts.pairs else "responses"
    print(f"{path}: {form}; {counts.pairs + counts.singles} {noun}")
    for reason, count in counts.dropped.items():
        print(f"  {count} rows dropped: {reason}")
    if counts.dropped_at:
        print(f"  first dropped: {', '.join(counts.dropped_at[:3])}")
    if counts.left_out:
        print(f"  columns left out: {', '.join(f'{name} ({count} rows)' for name, count in counts.left_out.items())}")
