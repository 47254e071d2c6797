"""What is asked of a model, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

LIKELIHOODS = ("auto", "nelbo", "causal")


class Continuation(NamedTuple):
    """Tokens to score, and those before them, of which there is at least one."""

    context: Sequence[int]
    tokens: Sequence[int]

    @property
    def ids(self) -> list[int]:
        return [*self.context, *self.tokens]


class Scored(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_likelihood: In nats; exact, or a lower bound (the negative NELBO).
        standard_error: Of the bound, over the draw of masks; 0 where nothing was drawn.
    """

    log_likelihood: float
    standard_error: float


def longest_first(requests: Sequence[Continuation]) -> list[int]:
    """Indices of the requests by length: neighbours waste little padding, and what needs most memory comes first."""
    return sorted(range(len(requests)), key=lambda index: -len(requests[index].context) - len(requests[index].tokens))


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns ids and document ids (-1 for padding) of rows of different lengths, filled up at their ends."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    documents = torch.tensor([[0] * len(row) + [-1] * (length - len(row)) for row in rows])
    return ids, documents


def in_parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yields `size` items at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
