"""Text of a row while it is being written: handed out as soon as nothing can change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.sampling.borders import Border
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import cut_at_stop, text_before_stop
from decausal.sampling.token_texts import BROKEN

CONTEXT = 8
"""Tokens before the text that decoding sees: some tokenizers drop the space in front of a text's first word."""


class TextStream:
    """Decodes a growing row of final tokens, piece by piece.

    What may still change is held back: bytes of a character whose rest is missing, and what may be the beginning of a
    stop string. The pieces together are what `text_after` makes of the whole.

    Args:
        tokenizer: Decodes.
        before: Ids in front of the text.
        settings: What ends the text.
        border: Characters of the tokens that are not of the text, at its beginning and its end.
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
        """Takes further final ids; returns the text that they make certain."""
        self._ids += ids
        read = self._decode(self._window, self._read)
        text = self._decode(self._window, len(self._ids))
        if text.endswith(BROKEN) or not text.startswith(read):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return self._send(self._held + text[len(read) :])

    def finish(self, ids: Sequence[int]) -> str:
        """Takes all new ids of the row that has ended; returns the rest of its text.

        The end of the text is where the first stop begins.
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
