"""Runs as one page that needs nothing beside it: curves, what to look at, answers, recipes side by side, origins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligner.common import html_pages
from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.report import run_data
from aligner.report.run_data import RunData, diagnose

COLORS = ("#2f6f9f", "#c8553d", "#588157", "#8d6a9f", "#b58900", "#4a4e69")
POINTS = 400
"""Of a curve; longer ones are averaged."""
WIDE = 3
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", (("loss", "-"),)),
    ("accuracy", (("acc", "-"),)),
    ("rewards: chosen, rejected (dashed)", (("rewards_chosen_mean", "-"), ("rewards_rejected_mean", "--"))),
    ("reward margin", (("rewards_margin_mean", "-"),)),
    ("log p: chosen, rejected (dashed), nats", (("logps_chosen_mean", "-"), ("logps_rejected_mean", "--"))),
    ("response tokens: chosen, rejected (dashed)", (("chosen_lengths", "-"), ("rejected_lengths", "--"))),
    ("learning rate", (("lr", "-"),)),
    ("gradient norm", (("grad_norm", "-"),)),
    ("tokens a second", (("tokens_per_second", "-"),)),
)
"""Title, and metrics with their line styles."""
SUMMARY = ("loss", "acc", "rewards_margin_mean", "rewards_chosen_mean", "rewards_rejected_mean", "logps_chosen_mean")


PAGE, TEMPLATE = "report.html", Path(__file__).with_name("run_page.html")
MIN_STEPS = 10
"""Steps below which a run that ends has no curve worth a page."""


def write_report(folders: list[str], output: str | None = None) -> Path:
    """Write the page of some runs.

    Args:
        folders: of the runs.
        output: the page; None: in the run's folder, or of several here.

    Raises:
        CheckpointError: a folder is none of a run.
    """
    runs = [run_data.read(folder) for folder in folders]
    path = Path(output).expanduser() if output else (runs[0].folder if len(runs) == 1 else Path()) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(page(runs))
    return path


def write_final_report(folder: Path) -> Path | None:
    """Draw a run that ends, whatever its end; nothing that fails in it may cost the run."""
    try:
        if len(run_data.read(folder).metrics) < MIN_STEPS:
            return None
        path = write_report([str(folder)])
    except Exception as error:
        log_rank0(f"no report of this run: {type(error).__name__}: {error}")
        return None
    log_rank0(f"report: {path}")
    return path


def page(runs: Sequence[RunData]) -> str:
    """The page."""
    names = _names(runs)
    return html_pages.render(
        TEMPLATE,
        title=", ".join(names),
        runs=[
            {"name": name, "color": color, "run": run, "findings": diagnose(run), "ends": _ends(run)}
            for name, color, run in zip(names, _colors(runs), runs, strict=True)
        ],
        names=names,
        charts=_charts(runs),
        settings=_settings(runs),
    )


def _names(runs: Sequence[RunData]) -> list[str]:
    """As short as tells them apart."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _colors(runs: Sequence[RunData]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def _ends(run: RunData) -> list[tuple[str, str, str]]:
    """First and last value of what one asks for first; of held-out rows where there are any."""
    split = "val" if run.curve("val/loss")[1] else "train"
    found = [(f"{split}/{name}", run.curve(f"{split}/{name}")[1]) for name in SUMMARY]
    return [(name, f"{values[0]:.4g}", f"{values[-1]:.4g}") for name, values in found if values]


def _settings(runs: Sequence[RunData]) -> list[tuple[str, list[str], bool]]:
    """Path, value in each run, whether they differ; those that do come first."""
    each = [run.settings() for run in runs]
    rows = []
    for path in sorted({path for settings in each for path in settings}):
        values = [settings.get(path, "") for settings in each]
        rows.append((path, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


# ---- curves -------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[RunData]) -> Any:
    """All curves that there are, as SVG; held-out rows thick and dotted where the training's are thin."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [chart for chart in CHARTS if any(_measured(run, metric) for run in runs for metric, _ in chart[1])]
    high = -(-len(shown) // WIDE)
    # Letters stay letters: the page is searchable, and small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo-align", "font.size": 9}):
        figure = Figure(figsize=(4.1 * WIDE, 2.7 * high))
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.18 / high, top=1 - 0.12 / high, hspace=0.42, wspace=0.2)
        for i, (title, metrics) in enumerate(shown, start=1):
            axes: Any = figure.add_subplot(high, WIDE, i)
            axes.set_title(title, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            for run, color in zip(runs, _colors(runs), strict=True):
                _draw(axes, run, metrics, color)
            if "learning rate" in title:
                axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        return html_pages.svg(figure)


def _measured(run: RunData, metric: str) -> bool:
    return any(f"{split}/{metric}" in row for split in ("train", "val") for row in run.metrics)


def _draw(axes: Any, run: RunData, metrics: Sequence[tuple[str, str]], color: str) -> None:
    for split, look in (("train", {"linewidth": 0.9, "alpha": 0.75}), ("val", {"linewidth": 1.6, "marker": "o"})):
        if metrics[0][0] == "tokens_per_second" and split == "val":
            continue
        drawn = []
        for metric, style in metrics:
            steps, values = _thinned(*run.curve(f"{split}/{metric}"))
            axes.plot(steps, values, linestyle=style, color=color, markersize=3, **look)
            drawn.append((steps, values))
        if len(drawn) == 2 and split == "val" and metrics[0][0].startswith("rewards"):
            (steps, chosen), (_, rejected) = drawn
            axes.fill_between(steps, chosen, rejected, color=color, alpha=0.08, linewidth=0)


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most `POINTS` points: means of neighbors."""
    each = -(-len(steps) // POINTS)
    if each <= 1:
        return steps, values
    parts = [slice(begin, begin + each) for begin in range(0, len(steps), each)]
    return [steps[part][-1] for part in parts], [sum(values[part]) / len(values[part]) for part in parts]
