"""A live view of one row: tokens appear in the terminal in the order in which the model commits them."""

from __future__ import annotations

import colorsys
import time
from types import TracebackType
from typing import Any

from jaxtyping import Bool, Int
from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text
from torch import Tensor

from decausal.sampling.token_texts import TokenTexts

OPEN_POSITION = "░"
COLOUR_STEPS = 24
"""Steps after which the colours begin again."""


class Watch:
    """Shows one row of the batch while it is denoised: pass it as `on_step` inside a `with` block.

    Given text is plain, tokens are coloured by the step in which they were kept, the newest ones reversed, open
    positions are dim blocks. Where the console is no terminal it prints a line at each quarter of the way instead,
    without colours.

    Example:
        >>> with Watch(model.tokenizer) as watch:
        ...     model.infill(prefix, suffix, length=48, on_step=watch)

    Args:
        tokenizer: Decodes.
        console: Where to draw; the standard output by default.
        row: Which row of the batch.
        pause: Seconds to rest after each step, so that a small model can be followed. Only in a terminal.
    """

    def __init__(self, tokenizer: Any, console: Console | None = None, row: int = 0, pause: float = 0.0) -> None:
        self.tokenizer, self.console, self.row, self.pause = tokenizer, console or Console(), row, pause
        self._texts = TokenTexts(tokenizer)
        self._step_of_position: dict[int, int] = {}
        self._num_open: int | None = None
        self._quarters_shown = 0
        self._live: Live | None = None

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(
        self, step: int, ids: Int[Tensor, "B T"], is_open: Bool[Tensor, "B T"], newly_kept: Bool[Tensor, "B T"]
    ) -> None:
        """Shows the row after a step: the signature of `sampler.OnStep`."""
        new = newly_kept[self.row].nonzero().squeeze(1).tolist()
        opened = is_open[self.row].nonzero().squeeze(1).tolist()
        if not new and self._num_open is not None:
            return
        self._step_of_position.update(dict.fromkeys(new, step))
        for position in opened:
            self._step_of_position.pop(position, None)
        if self._num_open is None:
            self._num_open = len(opened) + len(new)
        frame = self.frame(ids[self.row].tolist(), set(opened), set(new))
        if self._live is not None:
            self._live.update(frame, refresh=True)
            time.sleep(self.pause)
        else:
            self._print_quarter(step, frame, len(opened))

    def frame(self, ids: list[int], opened: set[int], new: set[int]) -> Text:
        """Draws a row."""
        text = Text()
        kept = [None if position in opened else token for position, token in enumerate(ids)]
        for position, piece in enumerate(self._texts.of(kept)):
            if piece is None:
                text.append(OPEN_POSITION, Style(dim=True))
            else:
                text.append(piece, self._style(position, is_new=position in new and bool(opened)))
        return text

    def _style(self, position: int, is_new: bool) -> Style:
        step = self._step_of_position.get(position)
        if step is None:
            return Style()
        red, green, blue = colour_of_step(step)
        return Style(color=f"rgb({red},{green},{blue})", reverse=is_new)

    def _print_quarter(self, step: int, frame: Text, num_open: int) -> None:
        num_kept = self._num_open - num_open
        quarters = 4 if num_open == 0 else 4 * num_kept // self._num_open
        if quarters > self._quarters_shown:
            self._quarters_shown = quarters
            title = f"after step {step + 1}: {num_kept} of {self._num_open} positions"
            self.console.print(title, frame.plain, sep="\n", markup=False, highlight=False, soft_wrap=True)


def colour_of_step(step: int) -> tuple[int, int, int]:
    """Red, green and blue of a step, from 0 to 255."""
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(0.55 + step / COLOUR_STEPS, 0.6, 0.8))
    return red, green, blue
