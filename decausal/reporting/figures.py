"""How figures look: light or dark, without a screen."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes


@dataclass(frozen=True)
class Palette:
    """Colours of all that is no data."""

    text: str
    grid: str
    background: str


LIGHT = Palette(text="#222222", grid="#dddddd", background="#ffffff")
DARK = Palette(text="#e4e4e4", grid="#3a3f44", background="#16191c")


def style(axes: Axes, palette: Palette) -> None:
    """Gives drawn axes the palette's colours: horizontal lines behind the data, no frame."""
    axes.set_facecolor(palette.background)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=palette.text, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette.grid)
    for words in (axes.title, axes.xaxis.label, axes.yaxis.label):
        words.set_color(palette.text)
    axes.title.set(fontweight="bold", fontsize=11)
