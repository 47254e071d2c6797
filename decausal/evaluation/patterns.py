"""Mask patterns, drawn for each document or block separately, from which likelihoods are estimated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.data.stream import Rows
from decausal.diffusion.layout import block_numbers
from decausal.diffusion.nelbo import draw_unit_patterns
from decausal.evaluation.passes import predicted_tokens


class NoisedRow(NamedTuple):
    """A mask pattern of one row, or a stacked batch of them.

    Attributes:
        slot: Index among the measured rows.
        weight: The weight n/m of the token's document, or block.
        num_masked: The m of the token's document, or block.
        num_predicted: The n of the token's document, or block.
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
    """Yields S noised views of each of the rows `indices`, with separate patterns for documents or blocks."""
    for slot, index in enumerate(indices):
        row = rows[index]
        clean_ids, document_ids = row["clean_ids"], row["document_ids"]
        unit_ids = _units(document_ids, block_size).where(predicted_tokens(row), -1)
        patterns = draw_unit_patterns(unit_ids, num_samples, seed=seed, position=index)
        num_predicted = patterns.num_maskable
        for is_masked, num_masked in zip(patterns.is_masked, patterns.num_masked, strict=True):
            weight = num_predicted / num_masked.clamp(min=1)
            yield NoisedRow(torch.tensor(slot), clean_ids, document_ids, is_masked, weight, num_masked, num_predicted)


def _units(document_ids: Int[Tensor, " T"], block_size: int | None) -> Int[Tensor, " T"]:
    """Returns the units that are denoised separately: documents, or their blocks."""
    return document_ids if block_size is None else block_numbers(document_ids[None], block_size)[0]


def stack(views: Sequence[NoisedRow]) -> NoisedRow:
    """Returns one batch, with a leading axis B in each tensor."""
    return NoisedRow(*(torch.stack(tensors) for tensors in zip(*views, strict=True)))


class WeightedPatterns(NamedTuple):
    """Mask patterns of one row of units, and the weights of masked tokens' losses.

    The mean of the weighted losses over patterns is an unbiased estimate of the sum of the units' NELBOs.

    Attributes:
        is_masked: What each pattern masks.
        weight: Weight of each token's loss; 0 if it is not masked.
        is_exact: Tokens of units with all their patterns, for which the result is exact.
    """

    is_masked: Bool[Tensor, "S T"]
    weight: Float[Tensor, "S T"]
    is_exact: Bool[Tensor, " T"]


def weighted_patterns(unit_ids: Int[Tensor, " T"], num_samples: int, *, seed: int, position: int) -> WeightedPatterns:
    """Draws `num_samples` patterns. Units with no more patterns than that get each of them once.

    A unit of n tokens has 2^n - 1 patterns that mask anything. If all units are small, there are only as many patterns
    as the largest unit has.

    Args:
        unit_ids: 0, 1, ... for tokens that are denoised together; -1 for those that are never masked.
        num_samples: The most patterns, S.
        seed: With `position`, the only source of randomness.
        position: Number of the row.
    """
    is_maskable = unit_ids >= 0
    unit = unit_ids.clamp(min=0)
    size = torch.zeros(int(unit.max()) + 1, dtype=torch.int64).index_add_(0, unit, is_maskable.long())
    num_patterns = 2.0 ** size.clamp(max=60) - 1
    is_exact = is_maskable & (num_patterns <= num_samples)[unit]
    if bool(is_exact[is_maskable].all()):
        num_samples = max(1, int(num_patterns.max()))
    drawn = draw_unit_patterns(unit_ids.where(~is_exact, -1), num_samples, seed=seed, position=position)
    is_masked = drawn.is_masked
    weight = (drawn.num_maskable / drawn.num_masked.clamp(min=1)).double()
    for number in unit[is_exact].unique().tolist():
        places = ((unit_ids == number) & is_exact).nonzero()[:, 0]
        masks, weights = _all_patterns(len(places))
        is_masked[: len(masks), places] = masks
        weight[: len(masks), places] = weights[:, None] * num_samples
    return WeightedPatterns(is_masked, weight.masked_fill(~is_masked, 0), is_exact)


@cache
def _all_patterns(n: int) -> tuple[Bool[Tensor, "P n"], Float[Tensor, " P"]]:
    """Returns all patterns that mask any of n tokens, and their weights in the NELBO (`decausal.diffusion.nelbo`)."""
    chosen = [(m, places) for m in range(1, n + 1) for places in combinations(range(n), m)]
    is_masked = torch.zeros(len(chosen), n, dtype=torch.bool)
    for row, (_, places) in enumerate(chosen):
        is_masked[row, list(places)] = True
    return is_masked, torch.tensor([1 / (m * math.comb(n, m)) for m, _ in chosen], dtype=torch.float64)
