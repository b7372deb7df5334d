"""Pages that need nothing beside them: a template of ours filled in, a figure drawn into it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"


def filled(template: str, **values: Any) -> str:
    """A page of `assets/`; text in it is escaped."""
    import jinja2

    return jinja2.Environment(autoescape=True).from_string((ASSETS / template).read_text()).render(**values)


def svg(figure: Any) -> Any:
    """A figure of matplotlib's as markup that a page takes as it is; the same figure is the same text."""
    import jinja2

    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return jinja2.utils.markupsafe.Markup(drawn.getvalue()[drawn.getvalue().index("<svg") :])
