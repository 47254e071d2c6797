"""Noise: which tokens of a row are masked.

Everything is a function of (seed, position). There is no global random state, every worker and process draws the same
row, and nothing has to be restored when a run resumes. The generator is counter-based, so a draw takes microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.diffusion.layout import block_numbers
from decausal.errors import UserError

EPSILON = 1 / 500

# Fractional part of the golden ratio, the rotation whose orbit is spread most evenly.
_GOLDEN = (5**0.5 - 1) / 2
_MASKS, _LEVELS, _OFFSET = range(3)
_WORD = 2**64


@dataclass(frozen=True)
class Noise:
    """K noised views of one row.

    Attributes:
        is_masked: Tokens to replace by the mask token.
        level: The level t of the token's document, or of its block, in that view. For padding, and in blocks without
            maskable tokens, it is 1, so that 1/t is finite.
    """

    is_masked: Bool[Tensor, "K T"]
    level: Float[Tensor, "K T"]


def noise_levels(
    position: int, seed: int, num_levels: int, stratified: bool, epsilon: float = EPSILON
) -> Float[Tensor, " num_levels"]:
    """Returns noise levels t, each uniform on [0, 1] over seeds, clamped to [epsilon, 1 - epsilon].

    Stratified levels are a rotation by the golden ratio, ``frac(offset(seed) + position * golden + j / num_levels)``:
    The levels of one position are evenly spaced. Those of any n consecutive positions have discrepancy O(log n / n),
    while independent ones have O(1 / sqrt(n)). So every batch is nearly stratified, whatever its micro-batches,
    accumulation steps and processes.

    Args:
        position: Training row, counted from the start of the run.
        seed: The run's seed.
        num_levels: Levels for this position (its documents times its views).
        stratified: False draws them independently.
        epsilon: Distance from 0 and 1.

    Source: stratified times, Kingma et al., Variational diffusion models (arXiv 2107.00630, appendix I.1), within a
    batch. Here they are stratified across positions, by a Kronecker sequence.
    """
    if stratified:
        offset = _generator(seed, 0, _OFFSET).random()
        level = (offset + position * _GOLDEN + np.arange(num_levels) / max(num_levels, 1)) % 1.0
    else:
        level = _generator(seed, position, _LEVELS).random(num_levels)
    return torch.from_numpy(level.clip(epsilon, 1 - epsilon)).float()


def draw_noise(
    document_ids: Int[Tensor, " T"],
    is_maskable: Bool[Tensor, " T"],
    *,
    position: int,
    seed: int,
    views: int = 1,
    complementary: bool = False,
    stratified: bool = True,
    block_size: int | None = None,
) -> Noise:
    """Draws K noised views of one row. Each document has its own level t, and each maskable token is masked with chance
    t.

    With `block_size`, each block of a document has its own level instead, since blocks are denoised one after another.

    Args:
        document_ids: 0, 1, ... inside the row, -1 for padding.
        is_maskable: Tokens that may be masked, already restricted to those that can be predicted
            (`decausal.diffusion.shift.predictable`).
        position: Training row, counted from the start of the run. With `seed` it is the only source of randomness.
        seed: The run's seed.
        views: K.
        complementary: The second of two views masks exactly the maskable tokens that the first one leaves, at level 1 -
            t. So every maskable token is a target once. Otherwise the views are drawn independently.
        stratified: See `noise_levels`; levels are spread over documents or blocks, and views.
        block_size: Tokens per block if levels belong to blocks; None if they belong to documents.

    Raises:
        UserError: For fewer than one view, or for complementary masks without two views.
    """
    if views < 1:
        raise UserError(f"views is {views}; accepted: 1 or more")
    if complementary and views != 2:
        raise UserError(f"complementary masks with views = {views}; complementary masks come in pairs: set views to 2")
    group_ids = document_ids if block_size is None else _noisable_blocks(document_ids, is_maskable, block_size)
    num_groups = int(group_ids.max()) + 1 if group_ids.numel() else 0
    drawn_views = 1 if complementary else views
    group_levels = noise_levels(position, seed, num_groups * drawn_views, stratified)
    level = _levels_of_tokens(group_levels.view(num_groups, drawn_views), group_ids)
    is_masked = (uniforms((drawn_views, len(document_ids)), position=position, seed=seed) < level) & is_maskable
    if complementary:
        is_masked = torch.cat([is_masked, is_maskable & ~is_masked])
        level = torch.cat([level, torch.where(group_ids < 0, 1.0, 1 - level)])
    return Noise(is_masked, level)


def uniforms(shape: tuple[int, ...], *, position: int, seed: int) -> Float[Tensor, "..."]:
    """Returns independent uniform numbers in [0, 1) for drawing masks, as a function of (seed, position)."""
    return torch.from_numpy(_generator(seed, position, _MASKS).random(shape))


def _noisable_blocks(
    document_ids: Int[Tensor, " T"], is_maskable: Bool[Tensor, " T"], block_size: int
) -> Int[Tensor, " T"]:
    """Numbers the blocks that hold a maskable token; -1 elsewhere. The numbers have no gaps, so that levels are evenly
    spread."""
    number = block_numbers(document_ids[None], block_size)[0]
    is_noisable = torch.zeros(len(number) + 1, dtype=torch.bool)  # the last place is the padding's, number -1
    is_noisable[number[is_maskable & (number >= 0)]] = True
    rank = torch.where(is_noisable, is_noisable.long().cumsum(dim=0) - 1, -1)
    return rank[number]


def _levels_of_tokens(group_levels: Float[Tensor, "M K"], group_ids: Int[Tensor, " T"]) -> Float[Tensor, "K T"]:
    no_level = torch.ones(1, group_levels.shape[1])
    # The id -1 picks the last row.
    return torch.cat([group_levels, no_level])[group_ids].T


def _generator(seed: int, position: int, stream: int) -> np.random.Generator:
    """Returns a separate generator for each (seed, position, stream), which are the words of a Philox key and
    counter."""
    key = np.array([seed % _WORD, position % _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)))
