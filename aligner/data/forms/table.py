"""All forms, and the one of a file: recognized by the keys of its first row, and held to for the whole file."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from aligner.common.errors import ConfigError, RowError
from aligner.data.forms import own, preference, rated
from aligner.data.forms.form import Form, Options, Values
from aligner.data.forms.messages import check_encodable
from aligner.data.rows import FORMS as EXPECTED
from aligner.data.rows import DroppedRow, FormatCounts, Row, load_json

FORMS = (own.PAIR, *rated.FORMS, *preference.FORMS, own.SINGLE, own.CONVERSATION)
"""In the order in which they are tried: the first whose keys a row has."""
BY_NAME = {form.name: form for form in FORMS}

SAYS = frozenset(key for form in FORMS for key in form.known) | {"images", "image", "videos", "audio", "audios"}
"""Keys of which some form reads a text or a judgement; another form that does not read one refuses it."""
_JUDGING = re.compile(
    r"(^|_)(chosen|rejected|label|score|rating|rank|ranking|helpfulness|correctness|coherence|complexity|verbosity"
    r"|weight|preference|preferred|reward|winner|loser|better|worse|vote|upvote|margin|quality|annotation|feedback"
    r"|strength|desirable|accepted|correct|toxicity|safety|safe|safer|unsafe|harmful|harmless|harmlessness|helpful"
    r"|truthful|truthfulness|honesty|verdict|judge?ment|grade|win|winrate|elo|star|like|thumb|critique|evaluation"
    r"|hallucination|good|bad)(s|es)?\d*(_|$)"
)
FORM_OF_NONE = own.PAIR.name
"""Form of a file in which no row can be read, for what its faults are called."""
DEFAULT = Options()
METADATA = frozenset(f"{side}{sep}model" for side in ("chosen", "rejected") for sep in ("_", "-"))
"""Names that look as if they judged: they say which model wrote a response."""


@functools.lru_cache(maxsize=1000)
def judges(key: str) -> bool:
    """Return whether a column's name says that it judges: such a column is used or refused, never passed over."""
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    return key not in METADATA and _JUDGING.search(words) is not None


@dataclass(frozen=True)
class Reader:
    """The form of one file, and the settings that it is read with."""

    name: str
    options: Options = DEFAULT

    @property
    def form(self) -> Form:
        return BY_NAME[self.name]

    def rows(self, texts: Iterable[tuple[str, str]], counts: FormatCounts) -> Iterator[Row]:
        """Yield the rows of lines and their `file:line`, and count them.

        Raises:
            RowError: a line is of another form, or holds what the form does not read.
        """
        form = self.form
        loaded = ((_loaded(text, source), source) for text, source in texts)
        if form.together is not None:
            key = form.together
            loaded = (
                _joined(list(lines), self, counts)
                for _, lines in groupby(loaded, key=lambda line: json.dumps(line[0].get(key), sort_keys=True))
            )
        for values, source in loaded:
            if form.together is None:
                self.check_keys(values, source, counts)
            for row in form.read(values, source, self.options):
                if isinstance(row, DroppedRow):
                    counts.drop(row)
                else:
                    counts.add(row)
                    yield row

    def check_keys(self, values: Values, source: str, counts: FormatCounts) -> None:
        """Check that a row has the form's keys, and no others that judge or say something; count what is left out.

        Raises:
            RowError: a key is missing, or one must not be passed over.
        """
        form = self.form
        missing = [key for key in sorted(form.needs) if values.get(key) is None]
        if missing and (other := _form_of(values)) not in (None, form):
            raise RowError(
                f"{source}: is of the form '{other.name}', and the file's first row of the form '{form.name}'; put "
                "them into two files",
                fault="mixed-forms",
            )
        if missing and form not in (own.PAIR, own.SINGLE, own.CONVERSATION):
            raise RowError(
                f"{source}: has no {', '.join(map(repr, missing))}, which the file's first row has ({form.name}); "
                f"found the keys {', '.join(map(repr, values)) or 'none'}"
            )
        if not missing and not form.fits(values):
            raise RowError(
                f"{source}: its values are not of the form '{form.name}', which the file's first row has",
                fault="mixed-forms",
            )
        others = [key for key, value in values.items() if value is not None and key not in form.known]
        refused = [key for key in others if (judges(key) or key in SAYS) and key not in self.options.ignore_columns]
        if refused:
            what = "judges" if judges(refused[0]) else "says something"
            more = f" (and {', '.join(map(repr, refused[1:]))})" if refused[1:] else ""
            raise RowError(
                f"{source}: has {refused[0]!r}, which {what}{more}, but is not read in rows of the form '{form.name}' "
                f"({', '.join(sorted(form.needs))}); take the column out, or leave it out with "
                f"ignore_columns={','.join(refused)} (in a run, data.ignore_columns)"
            )
        counts.left_out.update(others)


def recognize(line: str, source: str, options: Options = DEFAULT) -> Reader:
    """Return the reader of a file from its first line.

    Raises:
        RowError: the line is of no form.
    """
    values = load_json(line, source)
    form = _form_of(values)
    if form is not None:
        return Reader(form.name, options)
    near = max((own.PAIR, own.SINGLE), key=lambda form: len(form.needs & set(values)) + ("chosen_reward" in values))
    if len(near.needs & set(values)) > 1 or "chosen_response" in values or "messages" in values:
        return Reader(
            own.CONVERSATION.name if "messages" in values else near.name, options
        )  # which names what is missing
    raise RowError(
        f"{source}: is of no form that is read; expected {EXPECTED}; found the keys "
        f"{', '.join(map(repr, values)) or 'none'}"
    )


def _form_of(values: Values) -> Form | None:
    keys = {key for key, value in values.items() if value is not None}
    return next((form for form in FORMS if form.needs <= keys and form.fits(values)), None)


def check_options(options: Options, field: str = "") -> None:
    """Check the settings of forms; `field` begins their names in errors.

    Raises:
        ConfigError: one is unknown.
    """
    if options.ranked_pairs not in ("best_worst", "neighbours", "all"):
        raise ConfigError(f"{field}ranked_pairs: {options.ranked_pairs!r} is not one of best_worst, neighbours, all")


def _loaded(text: str, source: str) -> Values:
    """Load a line; half a character, as where an emoji was cut in two, is refused wherever it stands."""
    values = load_json(text, source)
    if "\\ud" in text or "\\uD" in text:
        check_encodable(json.dumps(values, ensure_ascii=False), source)
    return values


def _joined(lines: list[tuple[Values, str]], reader: Reader, counts: FormatCounts) -> tuple[Values, str]:
    for values, source in lines:
        reader.check_keys(values, source, counts)
    return {"rows": [values for values, _ in lines]}, lines[0][1]
