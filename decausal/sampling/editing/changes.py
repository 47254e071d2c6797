"""The changes that an edit made to a text, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

OLD, NEW = Style(color="red", strike=True), Style(color="green", bold=True)


@dataclass(frozen=True)
class Change:
    """A replaced piece of a text: characters `start` to `end` of the text before.

    Attributes:
        start: First character in the text before.
        end: The character after the last one in the text before.
        before: The old characters.
        after: The new characters.
    """

    start: int
    end: int
    before: str
    after: str


def apply(text: str, changes: Sequence[Change]) -> str:
    """Returns the text with its pieces replaced. Changes are in order and do not overlap."""
    return "".join(new if new is not None else given for given, new in _pieces(text, changes))


def word_diff(text: str, changes: Sequence[Change]) -> str:
    """Returns the text with old pieces as ``[-old-]`` and new ones as ``{+new+}``, like git's word diff."""
    shown = []
    for given, new in _pieces(text, changes):
        if new is None:
            shown.append(given)
        else:
            shown += [f"[-{given}-]" if given else "", f"{{+{new}+}}" if new else ""]
    return "".join(shown)


def coloured_diff(text: str, changes: Sequence[Change]) -> Text:
    """Returns the text with old pieces in red and struck out, and new ones in green."""
    shown = Text()
    for given, new in _pieces(text, changes):
        shown.append(given, Style() if new is None else OLD)
        shown.append(new or "", NEW)
    return shown


def _pieces(text: str, changes: Sequence[Change]) -> Iterator[tuple[str, str | None]]:
    """Yields (given text, what replaces it or None) from the beginning to the end."""
    end = 0
    for change in changes:
        yield text[end : change.start], None
        yield text[change.start : change.end], change.after
        end = change.end
    yield text[end:], None
