"""A display in the terminal that is redrawn continually. If the output is not a terminal, nothing is drawn."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live

View = TypeVar("View", bound="LiveView")


class LiveView:
    """Base class of views of something in progress. Enter it to begin the display, and leave it to end it.

    Args:
        console: Where to draw. If it is not a terminal, there is no display.
        options: Options for `rich.live.Live`.
    """

    def __init__(self, console: Console, **options: Any) -> None:
        self.console = console
        self._options = options
        self._live: Live | None = None

    def __enter__(self: View) -> View:
        if self.console.is_terminal:
            self._live = Live(console=self.console, **self._options)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
