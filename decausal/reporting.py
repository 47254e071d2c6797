"""What several verbs show runs with: the look of figures, crossings of curves, quiet libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Palette:
    """Colours of everything that is not data."""

    text: str
    grid: str
    background: str


LIGHT = Palette(text="#222222", grid="#dddddd", background="#ffffff")
DARK = Palette(text="#e4e4e4", grid="#3a3f44", background="#16191c")


def style(axes: Axes, palette: Palette) -> None:
    """Gives drawn axes the palette's colours, horizontal grid lines and no frame."""
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


def share_of_the_way(before: float, now: float, target: float) -> float:
    """Returns where the straight line from one measurement to the next meets `target`: 0 at the first, 1 at the second.

    Curves may fall or rise. If `target` does not lie between the two, the result is 1: the second measurement reached
    it.
    """
    is_between = before > target >= now or before < target <= now
    return (target - before) / (now - before) if is_between else 1.0


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turns off the libraries' progress bars and notes, for callers that show their own. Errors are still shown."""
    import datasets  # slow to import
    import transformers

    verbosity = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    had_datasets_bars = not datasets.are_progress_bars_disabled()
    fonts = logging.getLogger("matplotlib.font_manager")
    fonts_level = fonts.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    fonts.setLevel(logging.ERROR)
    try:
        yield
    finally:
        fonts.setLevel(fonts_level)
        if had_datasets_bars:
            datasets.enable_progress_bars()
        if had_bars:
            transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(verbosity)
