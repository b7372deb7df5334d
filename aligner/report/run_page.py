"""Self-contained HTML page of one or more runs: curves, findings, sample responses, recipes, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligner.common import html_pages, run_folder
from aligner.common.console import log_rank0
from aligner.common.files import atomic_write
from aligner.report import run_data
from aligner.report.run_data import RunData, diagnose

COLORS = ("#2f6f9f", "#c8553d", "#588157", "#8d6a9f", "#b58900", "#4a4e69")
POINTS = 400
"""Most points of a curve; longer curves are averaged."""
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
SUMMARY = {
    "loss": "loss",
    "acc": "accuracy",
    "rewards_margin_mean": "reward margin, nats",
    "rewards_chosen_mean": "reward of chosen, nats",
    "rewards_rejected_mean": "reward of rejected, nats",
    "logps_chosen_mean": "log p of chosen, nats",
}
"""Metrics of the first table, in words."""

TEMPLATE = Path(__file__).with_name("run_page.html")
MIN_STEPS = 10
"""A run with fewer logged steps gets no page when it ends."""


def write_report(folders: list[str], output: str | None = None) -> Path:
    """Write the page of one or more runs.

    Args:
        folders: folders of the runs.
        output: path of the page; None: in the run's folder, or for several runs in the current folder.

    Raises:
        CheckpointError: a folder is not a run's.
    """
    runs = [run_data.read(folder) for folder in folders]
    path = Path(output).expanduser() if output else (runs[0].folder if len(runs) == 1 else Path()) / run_folder.PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(page(runs))
    return path


def write_final_report(folder: Path) -> Path | None:
    """Write the page of a run that ends, also one that failed; an error of the page must not fail the run."""
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
    """Render the page."""
    names = _names(runs)
    return html_pages.render(
        TEMPLATE,
        title=", ".join(names),
        runs=[
            {"name": name, "color": color, "run": run, "findings": diagnose(run), "ends": _first_and_last(run)}
            for name, color, run in zip(names, _colors(runs), runs, strict=True)
        ],
        names=names,
        charts=_charts(runs),
        settings=_settings(runs),
    )


def _names(runs: Sequence[RunData]) -> list[str]:
    """Return the folder names of the runs, or their paths if names repeat."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _colors(runs: Sequence[RunData]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def _first_and_last(run: RunData) -> list[tuple[str, str, str, str]]:
    """Return first and last values of the `SUMMARY` metrics, with words; on held-out rows if there are any."""
    split = "val" if run.curve("val/loss")[1] else "train"
    curves = [(f"{split}/{name}", words, run.curve(f"{split}/{name}")[1]) for name, words in SUMMARY.items()]
    return [(name, f"{values[0]:.4g}", f"{values[-1]:.4g}", words) for name, words, values in curves if values]


def _settings(runs: Sequence[RunData]) -> list[tuple[str, list[str], bool]]:
    """Return path, value in each run, and whether the values differ; differing settings come first."""
    settings_by_run = [run.settings() for run in runs]
    rows = []
    for path in sorted({path for settings in settings_by_run for path in settings}):
        values = [settings.get(path, "") for settings in settings_by_run]
        rows.append((path, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


# ---- curves -------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[RunData]) -> list[Any]:
    """Draw each measured curve as SVG: training thin, held-out rows thick with dots.

    Losses of different kinds have other units, so each kind has a chart of its own.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []
    for title, metrics in CHARTS:
        groups = [list(runs)]
        if metrics[0][0] == "loss":
            kinds = list(dict.fromkeys(_kind_of_loss(run) for run in runs))
            groups = [[run for run in runs if _kind_of_loss(run) == kind] for kind in kinds]
        for group in groups:
            if not any(_is_measured(run, metric) for run in group for metric, _ in metrics):
                continue
            name = f"{title} ({_kind_of_loss(group[0])})" if len(groups) > 1 else title
            # Text stays text in the SVG: the page is searchable and small.
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"nemo-align {name}", "font.size": 9}):
                figure = Figure(figsize=(4.3, 2.7), layout="constrained")
                axes: Any = figure.subplots()
                axes.set_title(name, loc="left")
                axes.spines[["top", "right"]].set_visible(False)
                for run, color in zip(runs, _colors(runs), strict=True):
                    if run in group:
                        _draw(axes, run, metrics, color)
                if "learning rate" in title:
                    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
                drawn.append(html_pages.svg(figure))
    return drawn


def _kind_of_loss(run: RunData) -> str:
    settings = run.settings()
    if settings.get("preference_loss_weight") in ("0", "0.0"):
        return "sft"
    return settings.get("loss._target_", settings.get("loss", "")).rpartition(".")[2]


def _is_measured(run: RunData, metric: str) -> bool:
    return any(f"{split}/{metric}" in row for split in ("train", "val") for row in run.metrics)


def _draw(axes: Any, run: RunData, metrics: Sequence[tuple[str, str]], color: str) -> None:
    for split, line in (("train", {"linewidth": 0.9, "alpha": 0.75}), ("val", {"linewidth": 1.6, "marker": "o"})):
        if metrics[0][0] == "tokens_per_second" and split == "val":
            continue
        drawn = []
        for metric, style in metrics:
            steps, values = _thinned(*run.curve(f"{split}/{metric}"))
            axes.plot(steps, values, linestyle=style, color=color, markersize=3, **line)
            drawn.append((steps, values))
        if len(drawn) == 2 and split == "val" and metrics[0][0].startswith("rewards"):
            (steps, chosen), (_, rejected) = drawn
            axes.fill_between(steps, chosen, rejected, color=color, alpha=0.08, linewidth=0)


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbors to at most `POINTS` points."""
    size = -(-len(steps) // POINTS)
    if size <= 1:
        return steps, values
    parts = [slice(begin, begin + size) for begin in range(0, len(steps), size)]
    return [steps[part][-1] for part in parts], [sum(values[part]) / len(values[part]) for part in parts]
