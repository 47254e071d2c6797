"""Requests to a model, and its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

LIKELIHOODS = ("auto", "nelbo", "causal")


class Continuation(NamedTuple):
    """Tokens to score, and at least one token before them."""

    context: Sequence[int]
    tokens: Sequence[int]

    @property
    def ids(self) -> list[int]:
        return [*self.context, *self.tokens]


class Scored(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_likelihood: Log-likelihood in nats: exact, or a lower bound (the negative NELBO).
        standard_error: Standard error of the bound over the draw of masks; 0 if nothing was drawn.
    """

    log_likelihood: float
    standard_error: float


def longest_first(requests: Sequence[Continuation]) -> list[int]:
    """Returns the requests' indices by length, the longest first. So batches have little padding, and the most memory
    is needed first."""
    return sorted(range(len(requests)), key=lambda index: -len(requests[index].context) - len(requests[index].tokens))


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns ids and document ids (-1 for padding) of rows of different lengths, padded at their ends."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    documents = torch.tensor([[0] * len(row) + [-1] * (length - len(row)) for row in rows])
    return ids, documents


def in_parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yields `size` items at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
