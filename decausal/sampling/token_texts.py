"""The text that each token of a row adds, while some of the row is still open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BROKEN = "\N{REPLACEMENT CHARACTER}"
MOST_TOKENS = 4
"""The most tokens of one character: UTF-8 has at most 4 bytes."""
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Texts of tokens as they read after other text. A character of several tokens belongs to the last one.

    Args:
        tokenizer: Decodes ids.
        shows_special: Whether special tokens have their names as text, or none.
    """

    def __init__(self, tokenizer: Any, shows_special: bool = False) -> None:
        self._tokenizer, self._skips_special = tokenizer, not shows_special
        # Some tokenizers drop the space before a text's first word.
        self._anchor: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._before = self._decode([])
        self._alone: dict[int, str] = {}

    def of(self, ids: Sequence[int | None]) -> list[str | None]:
        """Returns the text of each token of a row; None for open positions.

        Next to an open position, a part of a character has no text yet.
        """
        texts: list[str | None] = []
        is_after_open = False
        while len(texts) < len(ids):
            token = ids[len(texts)]
            if token is None:
                texts.append(None)
                is_after_open = True
            elif is_after_open and self._continues(token):
                texts.append(self.alone(token).strip(BROKEN))
                is_after_open = not texts[-1]
            else:
                texts += self._joined(ids[len(texts) : len(texts) + MOST_TOKENS])
                is_after_open = False
        return texts

    def alone(self, token: int) -> str:
        """Returns the text of a token, whatever is around it."""
        if token not in self._alone:
            self._alone[token] = self._text([token])
        return self._alone[token]

    def bytes_of(self, token: int) -> bytes:
        """Returns a token's bytes, which need not be whole characters."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token not in self._added and name is not None:
            if self._is_byte_level and all(character in self._byte_of for character in name):
                return bytes(self._byte_of[character] for character in name)
            if found := _BYTE.fullmatch(name):
                return bytes([int(found[1], 16)])
        return self.alone(token).encode()

    def name_of(self, token: int) -> str:
        """Returns the text of a token, or its bytes as OpenAI writes them if they are not text."""
        text = self.alone(token)
        if BROKEN not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token))

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend is not None and b"ByteLevel" in backend.decoder.__getstate__()

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return {character: byte for byte, character in bytes_to_unicode().items()}

    def _continues(self, token: int) -> bool:
        """Returns whether a token begins with the rest of a character."""
        return self.alone(token).startswith(BROKEN) and self.bytes_of(token)[0] >> 6 == 0b10

    def _joined(self, ids: Sequence[int | None]) -> list[str]:
        """Returns the texts of the first tokens, up to the end of a character or an open position; else of one
        token."""
        pieces: list[str] = []
        shown = ""
        for number, token in enumerate(ids, start=1):
            if token is None:  # the rest of the character is still missing
                return pieces
            text = self.alone(token) if number == 1 else self._text(ids[:number])
            is_whole = not text.endswith(BROKEN)
            visible = text if is_whole or number == len(ids) < MOST_TOKENS else text.rstrip(BROKEN)
            pieces.append(visible[len(shown) :])
            shown = visible
            if is_whole:
                return pieces
        if len(ids) < MOST_TOKENS:  # the row is over
            return pieces
        return [self.alone(ids[0])]  # its character never ends; the next tokens may begin another

    def _text(self, ids: Sequence[int | None]) -> str:
        return self._decode(ids).removeprefix(self._before)

    def _decode(self, ids: Sequence[int | None]) -> str:
        return self._tokenizer.decode([*self._anchor, *ids], skip_special_tokens=self._skips_special)
