"""The report of a round as one page that needs nothing beside it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.round_report import RoundReport

TEMPLATE = Path(__file__).parent / "assets/round.html"
BLUE = "#2f6f9f"


def page(title: str, round: RoundReport) -> str:
    """Numbers, warnings, the judge's scores, and the answers to some prompts."""
    import jinja2

    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        why=round.why(),
        warnings=round.warnings(),
        numbers=[(name, f"{value:.4g}") for name, value in round.metrics().items()],
        plot=_plot(round.scores()),
        samples=round.samples,
    )


def _plot(scores: dict[str, int]) -> Any:
    """Judgements by score, as SVG."""
    import jinja2
    from matplotlib.figure import Figure

    if not scores:
        return ""
    figure = Figure(figsize=(5.2, 2.4), layout="constrained")
    axes: Any = figure.subplots()
    axes.bar(list(scores), list(scores.values()), color=BLUE)
    axes.set_xlabel("score")
    axes.set_ylabel("judgements")
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return jinja2.utils.markupsafe.Markup(drawn.getvalue()[drawn.getvalue().index("<svg") :])
