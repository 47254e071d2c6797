"""The comparison's figure: quality by training tokens and by tokens per forward, with the AR model's own line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decausal.compare.findings import Curve, ar_name
from decausal.compare.records import Score
from decausal.compare.settings import SPECULATIVE, STATIC, Schedule
from decausal.compare.training import RunResult
from decausal.reporting import LIGHT, Palette, style

# After Okabe and Ito: colour-blind readers can distinguish them.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def save_figure(
    path: Path,
    results: Sequence[RunResult],
    ar: tuple[Score, Score],
    *,
    threshold: Schedule,
    counted: str,
    unit: str,
    palette: Palette = LIGHT,
) -> None:
    """Saves the figure as PNG.

    Args:
        path: The file to write.
        results: All runs.
        ar: The AR model's scores, on the data of measurements during training and at the end.
        threshold: The schedule of the curves over training.
        counted: The training tokens on the x axis.
        unit: The unit of quality.
        palette: Light or dark.
    """
    is_decoded = any(score.tokens_per_forward is not None for result in results for score in result.final)
    figure = Figure(figsize=(11.0 if is_decoded else 6.0, 4.4), layout="constrained", facecolor=palette.background)
    panels = figure.subplots(1, 2 if is_decoded else 1, squeeze=False)[0]
    arms = list(dict.fromkeys(result.arm for result in results))
    looks = dict(zip(arms, cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    for arm, (colour, marker) in looks.items():
        of_arm = [result for result in results if result.arm == arm]
        _by_tokens(panels[0], of_arm, threshold, counted, colour, marker)
        if is_decoded:
            _by_speed(panels[1], of_arm, colour, marker)
    schedule = {None: "", STATIC: ", one token per forward"}.get(threshold, f", threshold {threshold}")
    panels[0].set_title(f"By training tokens{schedule}")
    panels[0].set_xlabel(f"{counted} training tokens")
    panels[0].set_ylabel(f"{unit}, nats per token" if threshold is None else unit)
    panels[0].set_xlim(left=0)
    if is_decoded:
        panels[1].set_title("At the end, by decoding speed")
        panels[1].set_xlabel("tokens per forward pass")
        if any(score.threshold == SPECULATIVE for result in results for score in result.final):
            hollow = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linewidth": 0}
            panels[1].plot([], [], color=palette.text, label="self-speculation", **hollow)
    for axes, score in zip(panels, ar, strict=False):
        axes.axhline(score.quality, color=palette.text, linestyle=":", linewidth=1.2, label=ar_name(score))
        axes.legend(facecolor=palette.background, edgecolor="none", labelcolor=palette.text, fontsize=9)
        style(axes, palette)
    if threshold is None:
        _cut_the_start(panels[0], results, ar[0])
    figure.savefig(path, dpi=130)


def _by_tokens(
    axes: Axes, results: Sequence[RunResult], threshold: Schedule, counted: str, colour: str, marker: str
) -> None:
    """Draws each seed as a thin line, and the mean over seeds at equal shares of the budget as a thick one."""
    curves = [Curve.of(result.measurements, threshold, counted) for result in results]
    for curve in curves:
        axes.plot(curve.tokens, curve.quality, color=colour, linewidth=0.8, alpha=0.4)
    tokens = [fmean(points) for points in zip(*(curve.tokens for curve in curves), strict=False)]
    quality = [fmean(points) for points in zip(*(curve.quality for curve in curves), strict=False)]
    axes.plot(tokens, quality, color=colour, marker=marker, markersize=5, linewidth=2, label=results[0].arm)


def _by_speed(axes: Axes, results: Sequence[RunResult], colour: str, marker: str) -> None:
    """Draws the final schedules from the static one to the boldest, and self-speculation as a hollow marker."""
    thresholds, speculative = (
        [[score for score in result.final if (score.threshold == SPECULATIVE) is is_speculative] for result in results]
        for is_speculative in (False, True)
    )
    means = sorted(_means_by_speed(axes, thresholds, colour))
    axes.plot(*zip(*means, strict=True), color=colour, marker=marker, markersize=5, linewidth=2, label=results[0].arm)
    for mean in _means_by_speed(axes, speculative, colour):
        axes.plot(*mean, color=colour, marker=marker, markersize=11, markerfacecolor="none", markeredgewidth=1.5)


def _means_by_speed(axes: Axes, by_seed: Sequence[Sequence[Score]], colour: str) -> list[tuple[float, float]]:
    """Draws each seed as faint dots. Returns the means over seeds of tokens per forward and quality, per schedule."""
    points = [[(score.tokens_per_forward or 0.0, score.quality) for score in scores] for scores in by_seed]
    for x, y in chain(*points):
        axes.plot(x, y, color=colour, marker=".", alpha=0.4)
    return [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in zip(*points, strict=True)]


def _cut_the_start(axes: Axes, results: Sequence[RunResult], ar: Score) -> None:
    """Cuts off the axis above everything measured after the start, whose fall would dwarf the rest."""
    after = [found.scores[0].quality for result in results for found in result.measurements if found.step > 0]
    low, high = min(*after, ar.quality), max(*after, ar.quality)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
