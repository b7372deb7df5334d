"""Lint report as terminal text and as one self-contained HTML page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligner.common import html_pages
from aligner.lint.rules import LintReport

BARS = " ▁▂▃▄▅▆▇█"
BLUE = "#2f6f9f"
TEMPLATE = Path(__file__).with_name("page.html")


def figures(report: LintReport) -> list[tuple[str, str]]:
    """Return the statistics of a split as (name, text) lines."""
    n = report.numbers
    lines = [
        ("rows", f"{n['rows']:,}" + (f", {n['readable']:,} of them readable" if n["readable"] < n["rows"] else ""))
    ]
    if "examples" in n:
        lines.append(("examples", f"{n['examples']:,}, one per assistant message of a conversation"))
    lines.append(("form", "; ".join(n.get("forms", []))))
    for name, spread in n.get("tokens", {}).items():
        lines.append((f"tokens, {name}", _format_spread(spread, 0)))
    if "overlong_fraction" in n:
        lines.append(("over seq_length", f"{n['overlong_fraction']:.2%} of the rows"))
    if "reward_gap" in n:
        lines.append(("chosen minus rejected reward", _format_spread(n["reward_gap"], 2)))
    if "length_bias" in n:
        bias = n["length_bias"]
        lines.append(
            (
                "length",
                f"the chosen response is longer in {bias['chosen_longer']:.0%} of the pairs, shorter in "
                f"{bias['rejected_longer']:.0%}; always choosing the longer one is right in "
                f"{bias['accuracy_of_always_the_longer']:.0%}",
            )
        )
    if "packing" in n:
        p = n["packing"]
        lines.append(
            (
                "packing",
                f"padded micro-batches of {p['micro_batch_size']} take {p['padded_positions_per_token']:.2f} "
                f"positions a token; packs of {p['packed_sequence_size']} (data.batching=packed) would be "
                f"{p['pack_fill']:.1%} full, {p['examples_per_pack']:.1f} examples each; packs made ahead of time "
                f"{p['pack_fill_ahead_of_time']:.1%}",
            )
        )
    if "global_batch" in n:
        g = n["global_batch"]
        line = f"{g['global_batch_size']} examples a step make {g['steps_per_epoch']} steps an epoch"
        if g["advised"] not in (None, g["global_batch_size"]):
            line += f"; data.global_batch_size={g['advised']} would make {g['steps_per_epoch_advised']}"
        lines.append(("global batch", line))
    return lines


def _format_spread(spread: dict[str, float], digits: int) -> str:
    return "  ".join(f"{name} {value:,.{digits}f}" for name, value in spread.items())


def verdict(report: LintReport) -> str:
    """Return the numbers of errors and warnings as one line."""
    errors, warnings = report.errors, len(report.findings) - report.errors
    if not report.findings:
        return "nothing found"
    counts = ((errors, "error"), (warnings, "warning"))
    return ", ".join(f"{count} kind{'s' * (count != 1)} of {severity}" for count, severity in counts)


def text(report: LintReport) -> str:
    """Format the report for a terminal."""
    lines = [f"{report.split}: {', '.join(report.files)}", f"  {verdict(report)}", ""]
    lines += [f"  {name:<34} {line}" for name, line in figures(report)]
    for name, (counts, edges) in report.histograms.items():
        most = max(counts) or 1
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)
        lines.append(f"  {name:<34} {edges[0]:,.6g} {bars} {edges[-1]:,.6g}")
    for finding in report.findings:
        lines += ["", f"  {finding.severity.upper()}: {finding.title}: {finding.count:,} ({finding.share:.1%})"]
        lines += [f"    {line}" for line in finding.detail.splitlines()]
        lines += [f"    at {', '.join(finding.where)}", f"    -> {finding.remedy}"]
    return "\n".join(lines)


def page(reports: list[LintReport]) -> str:
    """Format the reports as an HTML page."""
    shown = [
        {
            "report": report,
            "verdict": verdict(report),
            "figures": figures(report),
            "plots": {name: _plot(name, *histogram) for name, histogram in report.histograms.items()},
        }
        for report in reports
    ]
    return html_pages.render(TEMPLATE, title="Lint of preferences", shown=shown)


def _plot(name: str, counts: list[int], edges: list[float]) -> Any:
    """Draw a histogram as SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes: Any = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=BLUE)
    if name.startswith("tokens of a row") and edges[0] > 0 and edges[-1] > 20 * edges[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif not name.startswith("tokens of a row"):
        axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(name)
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    return html_pages.svg(figure)
