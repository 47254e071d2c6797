"""Text of a row while it is being written, passed on as soon as it is final."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.sampling.borders import Border
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import cut_at_stop, text_before_stop
from decausal.sampling.token_texts import BROKEN

CONTEXT = 8
"""Tokens before the text that are decoded with it, because some tokenizers drop the space before the first word."""


class TextStream:
    """Decodes a growing row of final tokens, piece by piece.

    Text that may still change is held back: bytes of an incomplete character, and what may be the beginning of a stop
    string. The pieces together equal `text_after` of the whole row.

    Args:
        tokenizer: Decodes ids.
        before: Ids before the text.
        settings: Settings with the stops that end the text.
        border: Characters of the tokens, at the beginning and the end, that do not belong to the text.
    """

    def __init__(
        self, tokenizer: Any, before: Sequence[int], settings: SamplerSettings, border: Border | None = None
    ) -> None:
        self._border = border or Border()
        self._to_skip = self._border.start
        self._tokenizer, self._before, self._settings = tokenizer, list(before), settings
        self._ids = list(before[-CONTEXT:])
        self._window, self._read = 0, len(self._ids)
        self._held = ""
        self.sent = ""

    def push(self, ids: Sequence[int]) -> str:
        """Takes further final ids, and returns the text that becomes final."""
        self._ids += ids
        read = self._decode(self._window, self._read)
        text = self._decode(self._window, len(self._ids))
        if text.endswith(BROKEN) or not text.startswith(read):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return self._send(self._held + text[len(read) :])

    def finish(self, ids: Sequence[int]) -> str:
        """Takes all new ids of the ended row, and returns the rest of its text.

        The text ends where the first stop begins.
        """
        whole = text_before_stop(self._tokenizer, self._before, ids, self._settings, self._border)
        rest = whole[len(self.sent) :] if whole.startswith(self.sent) else ""
        self.sent += rest
        return rest

    def _send(self, text: str) -> str:
        if text and self._to_skip:
            text, self._to_skip = text.removeprefix(self._to_skip), ""
        shown = cut_at_stop(text, self._settings.stop)
        if len(shown) == len(text):
            held = max(possible_stop(text, self._settings.stop), len(self._border.end))
            shown = text[: max(0, len(text) - held)]
        self._held = text[len(shown) :]
        self.sent += shown
        return shown

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Returns the length of the longest end of the text that may be the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
