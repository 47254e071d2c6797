"""A live view of one row: tokens appear in the terminal in the order in which the model commits them."""

from __future__ import annotations

import colorsys
import time
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from decausal.live import LiveView
from decausal.sampling.jobs import Progress
from decausal.sampling.token_texts import TokenTexts
from decausal.sampling.watching.followed import Followed

OPEN_POSITION = "░"
COLOUR_STEPS = 24
"""Steps after which the colours repeat."""


class Watch(LiveView):
    """Shows one row while it is written: pass it as `on_step` inside a `with` block.

    Given text is plain. Tokens are coloured by the step in which they were kept, the newest ones are reversed, and open
    positions are dim blocks. If the console is not a terminal, it prints a plain line at each quarter instead.

    Example:
        >>> with Watch(model.tokenizer) as watch:
        ...     model.infill(prefix, suffix, length=48, on_step=watch)

    Args:
        tokenizer: Decodes ids.
        console: Where to draw; the standard output by default.
        row: Which row of the call, from 0.
        pause: Seconds to rest after each step, so that a small model can be followed. Only in a terminal.
    """

    def __init__(self, tokenizer: Any, console: Console | None = None, row: int = 0, pause: float = 0.0) -> None:
        super().__init__(console or Console(), auto_refresh=False, vertical_overflow="crop")
        self.tokenizer, self.row, self.pause = tokenizer, row, pause
        self._texts = TokenTexts(tokenizer)
        self._followed: Followed | None = None
        self._quarters_shown = 0

    def __call__(self, progress: Progress) -> None:
        """Takes a step of any row and shows the one that is watched: the signature of `jobs.OnStep`."""
        if progress.ticket != self.row:
            return
        if progress.row is not None:
            self._followed, self._quarters_shown = Followed(progress.row), 0
        if self._followed is None:
            return
        self._followed.take(progress)
        frame = self.frame(self._followed)
        if self._live is not None:
            self._live.update(frame, refresh=True)
            time.sleep(self.pause)
        else:
            self._print_quarter(progress, frame, self._followed)

    def frame(self, followed: Followed) -> Text:
        """Draws a row."""
        text = Text()
        pieces = self._texts.of(followed.kept[: followed.length])
        for position, piece in enumerate(pieces):
            if piece is None:
                text.append(OPEN_POSITION, Style(dim=True))
            else:
                is_new = position in followed.new and followed.num_left > 0
                text.append(piece, _style(followed.step_of.get(position), is_new=is_new))
        return text

    def _print_quarter(self, progress: Progress, frame: Text, followed: Followed) -> None:
        num_kept = followed.num_open if progress.ended is not None else followed.num_open - followed.num_left
        quarters = 4 * num_kept // followed.num_open
        if quarters > self._quarters_shown:
            self._quarters_shown = quarters
            title = f"after step {progress.step + 1}: {num_kept} of {followed.num_open} positions"
            self.console.print(title, frame.plain, sep="\n", markup=False, highlight=False, soft_wrap=True)


def _style(step: int | None, is_new: bool) -> Style:
    if step is None:
        return Style()
    red, green, blue = colour_of_step(step)
    return Style(color=f"rgb({red},{green},{blue})", reverse=is_new)


def colour_of_step(step: int) -> tuple[int, int, int]:
    """Red, green and blue of a step, from 0 to 255."""
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(0.55 + step / COLOUR_STEPS, 0.6, 0.8))
    return red, green, blue
