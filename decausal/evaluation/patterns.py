"""Mask patterns of packed rows, drawn for each document on its own: what a likelihood is estimated from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.data.stream import Rows
from decausal.diffusion.nelbo import draw_patterns
from decausal.evaluation.passes import predicted_tokens


class NoisedRow(NamedTuple):
    """One mask pattern of one row; or, stacked, a batch of them.

    Attributes:
        slot: which of the measured rows.
        weight: n/m of the token's document.
        num_masked: m of the token's document.
        num_predicted: n of the token's document.
    """

    slot: Int[Tensor, "*B"]
    clean_ids: Int[Tensor, "*B T"]
    document_ids: Int[Tensor, "*B T"]
    is_masked: Bool[Tensor, "*B T"]
    weight: Float[Tensor, "*B T"]
    num_masked: Int[Tensor, "*B T"]
    num_predicted: Int[Tensor, "*B T"]


def noised_rows(rows: Rows, indices: Sequence[int], num_samples: int, seed: int) -> Iterator[NoisedRow]:
    """Yields the noised views of the rows `indices`, S of each, row by row."""
    for slot, index in enumerate(indices):
        row = rows[index]
        clean_ids, document_ids = row["clean_ids"], row["document_ids"]
        patterns = row_patterns(document_ids, predicted_tokens(row), num_samples, seed=seed, row_index=index)
        for is_masked, weight, num_masked in zip(patterns.is_masked, patterns.weight, patterns.num_masked, strict=True):
            yield NoisedRow(
                torch.tensor(slot), clean_ids, document_ids, is_masked, weight, num_masked, patterns.num_predicted
            )


def stack(views: Sequence[NoisedRow]) -> NoisedRow:
    """Returns one batch of them, each tensor with an axis B in front."""
    return NoisedRow(*(torch.stack(tensors) for tensors in zip(*views, strict=True)))


class RowPatterns(NamedTuple):
    """S mask patterns of a packed row; of each token's document: the weight n/m, m and n."""

    is_masked: Bool[Tensor, "S T"]
    weight: Float[Tensor, "S T"]
    num_masked: Int[Tensor, "S T"]
    num_predicted: Int[Tensor, "T"]


def row_patterns(
    document_ids: Int[Tensor, "T"], is_predicted: Bool[Tensor, "T"], num_samples: int, *, seed: int, row_index: int
) -> RowPatterns:
    """Draws the mask patterns of a row, for each of its documents on its own.

    Args:
        document_ids: 0, 1, ... inside the row, -1 for padding.
        is_predicted: tokens that may be masked.
        num_samples: S.
        seed: of the measurement.
        row_index: of the row in the data; with `seed` all the randomness there is.
    """
    shape = (num_samples, len(document_ids))
    is_masked, weight = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    num_masked = torch.zeros(shape, dtype=torch.int64)
    num_predicted = torch.zeros(len(document_ids), dtype=torch.int64)
    for document in document_ids[is_predicted].unique().tolist():
        in_document = is_predicted & (document_ids == document)
        # A row has at most T documents: no two documents and seeds of a measurement share a seed here.
        own_seed = seed * len(document_ids) + document
        patterns = draw_patterns(in_document, num_samples, seed=own_seed, position=row_index)
        is_masked |= patterns.is_masked
        weight[:, in_document] = patterns.weight[:, None].float()
        num_masked[:, in_document] = patterns.is_masked.sum(dim=1, keepdim=True)
        num_predicted[in_document] = in_document.sum()
    return RowPatterns(is_masked, weight, num_masked, num_predicted)
