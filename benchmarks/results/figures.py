"""Figures of results, as small PNG files for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from decausal.compare.plots import COLOURS
from decausal.reporting import LIGHT, style

Curve = Sequence[tuple[float, float]]


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[Curve]]], axis: str, measure: str) -> None:
    """Draws panels side by side with one vertical scale.

    Args:
        path: The file.
        panels: Of each panel, by title, its lines by name: a curve for each seed.
        axis, measure: What stands at the axes.
    """
    figure = Figure(figsize=(3.4 * len(panels), 3.4), layout="constrained", facecolor=LIGHT.background)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for colour, (name, curves) in zip(COLOURS, lines.items(), strict=False):
            for number, curve in enumerate(curves):
                axes.plot(*zip(*curve, strict=True), color=colour, marker=".", label=None if number else name)
        axes.set_title(title)
        axes.set_xlabel(axis)
        style(axes, LIGHT)
    all_axes[0].set_ylabel(measure)
    all_axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_points(path: Path, points: Mapping[str, Sequence[tuple[float, float]]], axis: str, measure: str) -> None:
    """Draws points with their names beside them.

    Args:
        path: The file.
        points: By name, a point for each seed.
        axis, measure: What stands at the axes.
    """
    figure = Figure(figsize=(6.0, 4.0), layout="constrained", facecolor=LIGHT.background)
    axes = figure.subplots()
    for number, (name, found) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*found, strict=True), color=colour, marker="o", linestyle="none")
        axes.annotate(name, found[0], xytext=(7, 0), textcoords="offset points", va="center", color=colour)
    axes.set_xlabel(axis)
    axes.set_ylabel(measure)
    axes.margins(0.2)
    style(axes, LIGHT)
    figure.savefig(path, dpi=130)
