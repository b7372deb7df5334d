"""Self-contained HTML pages: rendered templates with figures embedded as SVG.

Each template is in the folder of the module that renders it and extends `base.html`, which has the style sheet.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from aligner.common.secrets_filter import hidden

BASE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Render a template; text in `values` is escaped, and secrets are hidden.

    Args:
        template: template file.
        values: values of the template, and the `title` that `base.html` needs.
    """
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, BASE])
    return hidden(jinja2.Environment(autoescape=True, loader=loader).get_template(template.name).render(**values))


def svg(figure: Any) -> Any:
    """Convert a matplotlib figure to SVG that templates do not escape; the same figure gives the same text."""
    import jinja2

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return jinja2.utils.markupsafe.Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])
