"""Mask patterns of packed rows, drawn for each document or block on its own: what a likelihood is estimated from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.data.stream import Rows
from decausal.diffusion.layout import block_numbers
from decausal.diffusion.nelbo import draw_unit_patterns
from decausal.evaluation.passes import predicted_tokens


class NoisedRow(NamedTuple):
    """One mask pattern of one row; or, stacked, a batch of them.

    Attributes:
        slot: which of the measured rows.
        weight: n/m of the token's document, or block.
        num_masked: m of the token's document, or block.
        num_predicted: n of the token's document, or block.
    """

    slot: Int[Tensor, "*B"]
    clean_ids: Int[Tensor, "*B T"]
    document_ids: Int[Tensor, "*B T"]
    is_masked: Bool[Tensor, "*B T"]
    weight: Float[Tensor, "*B T"]
    num_masked: Int[Tensor, "*B T"]
    num_predicted: Int[Tensor, "*B T"]


def noised_rows(
    rows: Rows, indices: Sequence[int], num_samples: int, seed: int, block_size: int | None = None
) -> Iterator[NoisedRow]:
    """Yields the noised views of the rows `indices`, S of each; documents, or their blocks, on their own."""
    for slot, index in enumerate(indices):
        row = rows[index]
        clean_ids, document_ids = row["clean_ids"], row["document_ids"]
        unit_ids = _units(document_ids, block_size).where(predicted_tokens(row), -1)
        patterns = draw_unit_patterns(unit_ids, num_samples, seed=seed, position=index)
        num_predicted = patterns.num_maskable
        for is_masked, num_masked in zip(patterns.is_masked, patterns.num_masked, strict=True):
            weight = num_predicted / num_masked.clamp(min=1)
            yield NoisedRow(torch.tensor(slot), clean_ids, document_ids, is_masked, weight, num_masked, num_predicted)


def _units(document_ids: Int[Tensor, "T"], block_size: int | None) -> Int[Tensor, "T"]:
    """What is denoised on its own: a document, or a block of it."""
    return document_ids if block_size is None else block_numbers(document_ids[None], block_size)[0]


def stack(views: Sequence[NoisedRow]) -> NoisedRow:
    """Returns one batch of them, each tensor with an axis B in front."""
    return NoisedRow(*(torch.stack(tensors) for tensors in zip(*views, strict=True)))
