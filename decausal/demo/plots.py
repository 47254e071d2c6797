"""The figures of the report, drawn by matplotlib without a screen: light or dark, PNG or SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decausal.demo.history import MEASURES, Crossing, Measure, Measurement
from decausal.demo.terminal import LABELS, state_name
from decausal.reporting import DARK as DARK_PALETTE
from decausal.reporting import LIGHT as LIGHT_PALETTE
from decausal.reporting import Palette, style


@dataclass(frozen=True)
class Theme(Palette):
    """Colours that differ in brightness too, after Okabe and Ito: colour-blind readers can distinguish them, also in
    grey."""

    plain: str
    aligned: str
    before: str


LIGHT = Theme(**vars(LIGHT_PALETTE), plain="#d55e00", aligned="#0072b2", before="#9a9a9a")
DARK = Theme(**vars(DARK_PALETTE), plain="#f5a04d", aligned="#56b4e9", before="#8a8a8a")

_MARKERS = {"plain": "o", "aligned": "s"}


@dataclass(frozen=True)
class Curves:
    """What the figures show.

    Attributes:
        measurements: The measurements of the runs "plain" and "aligned".
        crossings: The crossings, by measure.
        cosines: The cosine of each hidden state, "before" training and after either run.
        ar_nll_per_token: The AR model's negative log-likelihood in nats.
    """

    measurements: dict[str, list[Measurement]]
    crossings: dict[Measure, Crossing]
    cosines: dict[str, list[float]]
    ar_nll_per_token: float


def figures(curves: Curves) -> dict[str, Callable[[Axes, Theme], None]]:
    """Returns the four figures by name, as functions that draw them."""
    return {
        "cross_entropy_by_step": lambda axes, theme: _falling(axes, theme, curves, "masked_cross_entropy", "step"),
        "cross_entropy_by_seconds": lambda axes, theme: _falling(
            axes, theme, curves, "masked_cross_entropy", "seconds"
        ),
        "nelbo_by_step": lambda axes, theme: _falling(axes, theme, curves, "nelbo_per_token", "step"),
        "cosines": lambda axes, theme: _cosines(axes, theme, curves),
    }


def as_data_uri(draw: Callable[[Axes, Theme], None], theme: Theme) -> str:
    """Draws one figure as an SVG that a page can hold: a `data:` URI. The same input gives the same bytes."""
    figure = Figure(figsize=(5.0, 3.6), layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot()
    draw(axes, theme)
    style(axes, theme)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "decausal"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"


def save_picture(path: Path, curves: Curves, theme: Theme = LIGHT) -> None:
    """Saves all four figures as one PNG."""
    figure = Figure(figsize=(11.0, 7.6), layout="constrained", facecolor=theme.background)
    for axes, draw in zip(figure.subplots(2, 2).flat, figures(curves).values(), strict=True):
        draw(axes, theme)
        style(axes, theme)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.savefig(path, dpi=130)


def _falling(axes: Axes, theme: Theme, curves: Curves, measure: Measure, against: str) -> None:
    """Draws a measure of both runs against steps or seconds, the plain run's best, and where the aligned run meets
    it."""
    for arm, measurements in curves.measurements.items():
        x, y = ([getattr(found, name) for found in measurements] for name in (against, measure))
        axes.plot(x, y, color=getattr(theme, arm), marker=_MARKERS[arm], markersize=4, label=LABELS[arm])
    crossing = curves.crossings[measure]
    axes.axhline(crossing.plain_best, color=theme.plain, linestyle="--", linewidth=1, label="plain denoising's best")
    _mark_crossing(axes, theme, crossing, against)
    if measure == "nelbo_per_token":
        axes.axhline(
            curves.ar_nll_per_token, color=theme.text, linestyle=":", linewidth=1, label="AR model's NLL, same tokens"
        )
    _limit(axes, curves, measure)
    name = MEASURES[measure]
    per = "masked token" if measure == "masked_cross_entropy" else "token"
    axes.set_title(f"Held-out {name} by {'step' if against == 'step' else 'training time'}")
    axes.set_xlabel("training step" if against == "step" else "seconds of training, without measuring")
    axes.set_ylabel(f"nats per {per}")
    axes.legend(facecolor=theme.background, edgecolor="none", labelcolor=theme.text, fontsize=9)


def _mark_crossing(axes: Axes, theme: Theme, crossing: Crossing, against: str) -> None:
    x = crossing.between_step if against == "step" else crossing.between_seconds
    if x is None:
        return
    words = f"step {x:.0f}" if against == "step" else f"{x:.1f} s"
    axes.plot(
        [x], [crossing.plain_best], marker="*", markersize=14, color=theme.aligned, markeredgecolor=theme.text, zorder=5
    )
    axes.annotate(
        words,
        (x, crossing.plain_best),
        xytext=(0, -18),
        textcoords="offset points",
        ha="center",
        color=theme.text,
        fontsize=10,
    )


def _limit(axes: Axes, curves: Curves, measure: Measure) -> None:
    """Cuts off the axis above everything measured after the start, whose fall would dwarf the rest."""
    measurements = [found for of_arm in curves.measurements.values() for found in of_arm]
    highest = max(getattr(found, measure) for found in measurements if found.step > 0)
    lowest = min(getattr(found, measure) for found in measurements)
    if measure == "nelbo_per_token":
        lowest = min(lowest, curves.ar_nll_per_token)
    margin = 0.12 * (highest - lowest) or 0.1
    axes.set_ylim(lowest - 1.5 * margin, highest + margin)


def _cosines(axes: Axes, theme: Theme, curves: Curves) -> None:
    """Draws bars for each hidden state: before training, after plain denoising, after REPR-ALIGN."""
    labels = {"before": "before", **{arm: f"after {LABELS[arm]}" for arm in curves.measurements}}
    width = 0.8 / len(labels)
    num_states = len(curves.cosines["before"])
    for index, (name, label) in enumerate(labels.items()):
        places = [state + (index - 1) * width for state in range(num_states)]
        axes.bar(places, curves.cosines[name], width, color=getattr(theme, name), label=label)
    axes.set_xticks(range(num_states), _state_labels(num_states), fontsize=9)
    axes.set_ylim(min(0.0, *(min(cosines) for cosines in curves.cosines.values())), 1.15)  # the legend is on top
    axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_title("Hidden states: how near to the AR model's")
    axes.set_xlabel("hidden state, from embeddings to final norm")
    axes.set_ylabel("mean cosine")
    axes.legend(frameon=False, labelcolor=theme.text, fontsize=9, loc="upper center", ncols=3, columnspacing=1.0)


def _state_labels(num_states: int) -> Sequence[str]:
    short = {"embeddings": "emb.", "final norm": "norm"}
    names = [state_name(index, num_states) for index in range(num_states)]
    return [short.get(name, name.removeprefix("layer ")) for name in names]
