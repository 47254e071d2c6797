"""Describes texts that a model wrote without reading them: length, repetition, distinct n-grams, entropy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

REPEATED = 4
"""Tokens of the pieces whose repetition is counted."""
DISTINCT = (1, 2, 3)


@dataclass(frozen=True)
class TextFigures:
    """Figures of several texts.

    Attributes:
        num_texts: How many texts.
        length: Mean number of tokens of a text.
        repetition: Share of a text's pieces of four tokens that occurred in it before: the mean over texts with such
            pieces.
        distinct: Share of different pieces among all pieces of n tokens of all texts together, for n = 1, 2, 3.
        entropy: Mean entropy of the distribution of a text's tokens, in nats: 0 for one token repeated.
        unit: What a token is: "tokens" of the model, or "words".
    """

    num_texts: int
    length: float
    repetition: float | None
    distinct: tuple[float | None, ...]
    entropy: float | None
    unit: str = "tokens"

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as plain values."""
        return asdict(self) | {"distinct": list(self.distinct)}


def text_figures(texts: Sequence[Sequence[Hashable]], unit: str = "tokens") -> TextFigures:
    """Returns the figures of texts, each a sequence of tokens.

    Raises:
        ValueError: There are none.
    """
    if not texts:
        raise ValueError("there are no texts")
    repeated = [1 - len(set(pieces)) / len(pieces) for text in texts if (pieces := _pieces(text, REPEATED))]
    distinct = []
    for n in DISTINCT:
        pieces = [piece for text in texts for piece in _pieces(text, n)]
        distinct.append(len(set(pieces)) / len(pieces) if pieces else None)
    entropies = [_entropy(text) for text in texts if text]
    return TextFigures(
        num_texts=len(texts),
        length=fmean(map(len, texts)),
        repetition=fmean(repeated) if repeated else None,
        distinct=tuple(distinct),
        entropy=fmean(entropies) if entropies else None,
        unit=unit,
    )


def _pieces(text: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(text[start:] for start in range(n)), strict=False))


def _entropy(text: Sequence[Hashable]) -> float:
    counts = Counter(text).values()
    return sum(-count / len(text) * math.log(count / len(text)) for count in counts)
