"""HTML pages that need no other file: a template is filled in, a figure is embedded as SVG.

A template stands beside the module that fills it, and extends `base.html`, which holds the style sheet of all pages.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

BASE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Fill in a template; text in `values` is escaped.

    Args:
        template: the file; `base.html` needs a `title` beside its own values.
    """
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, BASE])
    return jinja2.Environment(autoescape=True, loader=loader).get_template(template.name).render(**values)


def svg(figure: Any) -> Any:
    """A matplotlib figure as markup that a template takes unescaped; the same figure gives the same text."""
    import jinja2

    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return jinja2.utils.markupsafe.Markup(drawn.getvalue()[drawn.getvalue().index("<svg") :])
