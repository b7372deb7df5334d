"""The report of a round as one page that needs nothing beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aligner import html

if TYPE_CHECKING:
    from aligner.round_report import RoundReport

BLUE = "#2f6f9f"


def page(title: str, round: RoundReport) -> str:
    """Numbers, warnings, the judge's scores, and the answers to some prompts."""
    return html.filled(
        "round.html",
        title=title,
        why=round.why(),
        warnings=round.warnings(),
        numbers=[(name, f"{value:.4g}") for name, value in round.metrics().items()],
        plot=_plot(round.scores()),
        samples=round.samples,
    )


def _plot(scores: dict[str, int]) -> Any:
    """Judgements by score, as SVG."""
    from matplotlib.figure import Figure

    if not scores:
        return ""
    figure = Figure(figsize=(5.2, 2.4), layout="constrained")
    axes: Any = figure.subplots()
    axes.bar(list(scores), list(scores.values()), color=BLUE)
    axes.set_xlabel("score")
    axes.set_ylabel("judgements")
    axes.spines[["top", "right"]].set_visible(False)
    return html.svg(figure)
