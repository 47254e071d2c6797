"""Handles tokens that cross the border between given text and a gap.

Most tokenizers join a space, or a line break with its indentation, to what follows it. A text that is cut between the
two ends in a token that is rare in training, and the gap is filled badly (docs/log.md). So these characters are left
out of the given tokens. The gap's first token must begin with them, or its last token must end with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_INDENTATION = re.compile(r"[ \t]+(?=\S)")


class Border(NamedTuple):
    """Given characters inside a gap's tokens.

    Attributes:
        start: What its first token begins with.
        end: What its last token ends with.
    """

    start: str = ""
    end: str = ""

    def inside(self, text: str) -> str:
        """Returns the new part of the text of the gap's tokens."""
        return text.removeprefix(self.start).removesuffix(self.end)


def split_at_borders(
    tokenizer: Any, given: Sequence[str], lengths: Sequence[int | None]
) -> tuple[list[str], tuple[Border, ...]]:
    """Returns the given texts without the characters at borders, and these characters.

    Args:
        tokenizer: The model's.
        given: Texts before, between and after the gaps.
        lengths: Lengths of the gaps; None if unknown.
    """
    texts, borders = list(given), []
    vocabulary = Vocabulary.of(tokenizer)
    for gap, length in enumerate(lengths):
        border = vocabulary.border(texts[gap], texts[gap + 1], 1 if length is None else length)
        texts[gap] = texts[gap].removesuffix(border.start)
        texts[gap + 1] = texts[gap + 1].removeprefix(border.end)
        borders.append(border)
    return texts, tuple(borders)


class Vocabulary:
    """The text of every token as it reads after other text; special tokens have none."""

    _known: ClassVar[WeakKeyDictionary[Any, Vocabulary]] = WeakKeyDictionary()

    def __init__(self, tokenizer: Any) -> None:
        anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        pairs = [[*anchor, token] for token in range(len(tokenizer))]
        before, *whole = tokenizer.batch_decode([anchor, *pairs], skip_special_tokens=True)
        self.texts = [text.removeprefix(before) for text in whole]
        self._lengths = torch.tensor([len(text) for text in self.texts])
        self._by_end: dict[str, list[int]] = {}  # tokens by every indentation that they end with
        for token, text in enumerate(self.texts):
            for start in range(len(text.rstrip(" \t")), len(text)):
                self._by_end.setdefault(text[start:], []).append(token)
        self._fitting: dict[Border, Bool[Tensor, " V"]] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Returns the vocabulary of a tokenizer, read once."""
        known = cls._known.get(tokenizer)
        if known is None or len(known.texts) != len(tokenizer):
            known = cls._known[tokenizer] = cls(tokenizer)
        return known

    def border(self, before: str, after: str, length: int) -> Border:
        """Returns the fewest characters beside a gap of `length` tokens that this tokenizer joins to others."""
        start = before[-1:] if len(before) > 1 and before[-1].isspace() else ""
        indentation = _INDENTATION.match(after)
        end = indentation[0][:-1] if indentation else ""
        if not self._joins(Border(start=start)):
            start = ""
        if not self._joins(Border(end=end)):
            end = ""
        if length == 1 and not self.fitting(Border(start, end)).any():
            return Border()
        return Border(start, end)

    def _joins(self, border: Border) -> bool:
        """Returns whether some token holds these characters and more."""
        num_given = len(border.start) + len(border.end)
        if border.end and border.end not in self._by_end:  # very long indentations from clients are not cached
            return False
        return bool((self._lengths[self.fitting(border)] > num_given).any())

    def fitting(self, border: Border) -> Bool[Tensor, " V"]:
        """Returns which tokens may stand at a border."""
        if border not in self._fitting:
            tokens = self._by_end.get(border.end, []) if border.end else range(len(self.texts))
            self._fitting[border] = torch.zeros(len(self.texts), dtype=torch.bool)
            self._fitting[border][[token for token in tokens if _fits(self.texts[token], border)]] = True
        return self._fitting[border]


def _fits(text: str, border: Border) -> bool:
    """Returns whether a token may stand at a border. At its end it adds nothing to an indentation that is given."""
    if len(text) < len(border.start) + len(border.end):
        return False
    is_deeper = border.end != "" and text.removesuffix(border.end).endswith((" ", "\t"))
    return text.startswith(border.start) and text.endswith(border.end) and not is_deeper


@dataclass(frozen=True)
class Allowed:
    """The tokens that positions of rows may get.

    Attributes:
        index: Row of `tokens`; -1 if any token is allowed.
        tokens: True for allowed tokens.
    """

    index: Int[Tensor, "A T"]
    tokens: Bool[Tensor, "S V"]


class AllowedTokens:
    """Sets of tokens by what they begin and end with, built on first use.

    Args:
        tokenizer: The model's.
        vocabulary_size: Rows of the model's head.
        device: Where the sets are used.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[Border, int] = {}
        self.tokens: Bool[Tensor, "S V"] = torch.zeros(0, vocabulary_size, dtype=torch.bool, device=device)

    def numbers(self, spans: Sequence[range], borders: Sequence[Border]) -> dict[int, int]:
        """Returns, by position, the set of tokens allowed at the borders of a row's gaps."""
        wanted: dict[int, Border] = {}
        for span, border in zip(spans, borders, strict=False):
            wanted[span.start] = Border(start=border.start)
            last = wanted.get(span.stop - 1, Border())
            wanted[span.stop - 1] = last._replace(end=border.end)
        return {position: self._number(border) for position, border in wanted.items() if border != Border()}

    def _number(self, border: Border) -> int:
        if border not in self._numbers:
            fitting = Vocabulary.of(self._tokenizer).fitting(border)[: self.tokens.shape[1]]
            new = torch.nn.functional.pad(fitting, (0, self.tokens.shape[1] - len(fitting)))
            self.tokens = torch.cat([self.tokens, new[None].to(self.tokens.device)])
            self._numbers[border] = len(self._numbers)
        return self._numbers[border]
