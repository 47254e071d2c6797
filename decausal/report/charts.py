"""Line charts as SVG inside a page, in colours that are readable on light and dark backgrounds."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# After Okabe and Ito: colour-blind readers can distinguish them.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TEXT, _GRID = "#010203", "#040506"  # replaced by the page's own colours


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: What it is.
        points: Its points (x, y).
        errors: Standard errors of y; empty for none.
        is_level: Whether it is one value, drawn across the chart.
    """

    label: str
    points: list[tuple[float, float]]
    errors: list[float | None] = field(default_factory=list)
    is_level: bool = False


def chart(lines: Sequence[Line], title: str, x: str, y: str) -> str:
    """Returns a chart as SVG, with the colours of text and grid from the page's variables --text and --line."""
    import matplotlib
    from matplotlib.figure import Figure

    from decausal.reporting import Palette, style

    palette = Palette(text=_TEXT, grid=_GRID, background="none")
    figure = Figure(figsize=(5.2, 3.6), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    for number, line in enumerate(lines):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        if line.is_level:
            axes.axhline(line.points[0][1], color=_TEXT, linestyle=":", linewidth=1.2, label=line.label)
            continue
        xs, ys = zip(*line.points, strict=True)
        dots = marker if len(line.points) <= 40 else ""
        axes.plot(xs, ys, color=colour, marker=dots, markersize=4, linewidth=1.6, label=line.label)
        if any(error is not None for error in line.errors):
            axes.errorbar(xs, ys, [error or 0 for error in line.errors], fmt="none", ecolor=colour, alpha=0.5)
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(facecolor="none", edgecolor="none", labelcolor=_TEXT, fontsize=8)
    style(axes, palette)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"{title} {x} {y}", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "var(--text)").replace(_GRID, "var(--line)")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="chart" viewBox="\1" role="img">', svg, count=1)
