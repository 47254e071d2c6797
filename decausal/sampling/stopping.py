"""Where a text that ends a row first stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.sampling.rows import text_after


def tokens_to_stop(
    tokenizer: Any, before: Sequence[int], new: Sequence[int], num_searched: int, stop: Sequence[str]
) -> int | None:
    """The fewest new tokens whose text holds one of `stop`; None where none does.

    Args:
        tokenizer: decodes ids.
        before: ids before the new ones, part of no match.
        new: ids of the new text.
        num_searched: that many of them have been searched already.
        stop: texts, none of them empty.
    """
    # A text of n bytes spans at most n tokens that hold any of it; a few more, since some tokens decode to nothing.
    reach = max(len(text.encode()) for text in stop) + 8
    first = max(0, num_searched - reach)
    anchor = [*before[-1:], *new[:first]][-1:]

    def holds(count: int) -> bool:
        text = text_after(tokenizer, anchor, list(new[first:count]))
        return any(wanted in text for wanted in stop)

    if len(new) <= num_searched or not holds(len(new)):
        return None
    return next(count for count in range(num_searched + 1, len(new) + 1) if holds(count))


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of `stop` in it."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text
