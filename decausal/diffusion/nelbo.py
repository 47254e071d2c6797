"""The negative evidence lower bound (NELBO) of masked diffusion, exactly and by sampling.

With the linear schedule (a token is masked with chance t) the bound on -log p(x), in nats, is

    NELBO = E_t,S [ (1/t) sum_{i in S} -log p(x_i | x outside S) ],  t ~ U(0, 1), S ~ Bernoulli(t) on n maskable tokens.

After integrating over t, a set S of m tokens has weight B(m, n - m + 1) = 1 / (m C(n, m)). Drawing m uniformly in 1..n,
then S uniformly among the sets of m, and weighting by n/m gives the same. So the bound equals the negative
log-likelihood of generating the tokens one by one in a random order.

Source: Ou et al., Your absorbing discrete diffusion secretly models the conditional distributions of clean data
(arXiv 2406.03736); Sahoo et al., Simple and effective masked diffusion language models (arXiv 2406.07524).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.diffusion.noise import noise_levels, uniforms

MAX_ENUMERATED = 20

TokenLogProbs = Callable[[Bool[Tensor, "P T"]], Float[Tensor, "P T"]]
"""Maps mask patterns of one row to log p(token | unmasked tokens) of each token. Only masked tokens count."""


def nelbo_exact(
    token_log_probs: TokenLogProbs, is_maskable: Bool[Tensor, " T"], block_size: int | None = None
) -> float:
    """Returns the NELBO in nats, by enumerating all mask patterns: 2^n of them for n maskable tokens (or for a block's
    n).

    With `block_size` K, blocks of K tokens are denoised from left to right, as a model of block layout writes. While a
    block is scored, earlier blocks are clean, and the maskable tokens of later blocks are all masked. Block size 1
    gives the autoregressive negative log-likelihood.

    Args:
        token_log_probs: Called with patterns of one size at a time.
        is_maskable: Tokens that may be masked; the others are always seen.
        block_size: Tokens per block, on a grid from the row's start. None: one block for the whole row.

    Raises:
        ValueError: If a block has more than 20 maskable tokens.
    """
    length = len(is_maskable)
    size = block_size or max(length, 1)
    return sum(
        _block_nelbo(token_log_probs, is_maskable, start, min(start + size, length)) for start in range(0, length, size)
    )


def _block_nelbo(token_log_probs: TokenLogProbs, is_maskable: Bool[Tensor, " T"], start: int, end: int) -> float:
    places = [i for i in range(start, end) if is_maskable[i]]
    n = len(places)
    if n > MAX_ENUMERATED:
        raise ValueError(f"{n} maskable tokens have 2^{n} mask patterns; enumeration takes at most {MAX_ENUMERATED}")
    is_later = is_maskable.clone()
    is_later[:end] = False
    total = 0.0
    for m in range(1, n + 1):
        patterns = torch.tensor(list(combinations(places, m)), device=is_maskable.device)
        in_block = torch.zeros(len(patterns), len(is_maskable), dtype=torch.bool, device=is_maskable.device)
        in_block.scatter_(1, patterns, True)
        log_probs = token_log_probs(in_block | is_later)
        total -= _masked_sum(log_probs, in_block).sum().item() / (m * math.comb(n, m))
    return total


@dataclass(frozen=True)
class MaskPatterns:
    """Random mask patterns of one row, with weights: ``weight * sum of masked -log p`` is an unbiased estimate of the
    NELBO."""

    is_masked: Bool[Tensor, "S T"]
    weight: Float[Tensor, " S"]


def draw_patterns(
    is_maskable: Bool[Tensor, " T"], num_samples: int, *, seed: int, position: int = 0, estimator: str = "count"
) -> MaskPatterns:
    """Draws mask patterns whose weighted losses estimate the NELBO.

    Documents packed into one row may share its patterns. For each document, a pattern of the row has the right
    distribution and weight.

    Args:
        is_maskable: Tokens that may be masked.
        num_samples: S. Their noise levels (or mask counts) are stratified over the samples and, for consecutive
            positions, over the rows.
        seed: With `position`, all the randomness there is.
        position: Number of the row.
        estimator: ``"count"`` draws the number m of masked tokens and weights by n/m, at most n; ``"level"`` draws t
            and weights by 1/t, which has no bound. Equal in expectation; "count" varies less.

    Raises:
        ValueError: For an unknown estimator.
    """
    if estimator not in ("count", "level"):
        raise ValueError(f"estimator '{estimator}' is not known; accepted: count, level")
    if estimator == "count":
        patterns = draw_unit_patterns(is_maskable.long().cpu() - 1, num_samples, seed=seed, position=position)
        num_masked = patterns.is_masked.sum(dim=1)
        return MaskPatterns(patterns.is_masked, is_maskable.sum().cpu() / num_masked.clamp(min=1))
    level = noise_levels(position, seed, num_samples, stratified=True, epsilon=1e-9).double()
    uniform = uniforms((num_samples, len(is_maskable)), seed=seed, position=position)
    return MaskPatterns((uniform < level[:, None]) & is_maskable.cpu(), 1 / level)


@dataclass(frozen=True)
class UnitPatterns:
    """Random mask patterns of a row of units, each with its own number of masked tokens.

    Attributes:
        is_masked: In each unit of n tokens, m masked ones: m is uniform in 1..n, and the set is uniform among those of
            m.
        num_masked: The m of each token's unit; 0 for tokens of none.
        num_maskable: The n of each token's unit; 0 for tokens of none.
    """

    is_masked: Bool[Tensor, "S T"]
    num_masked: Int[Tensor, "S T"]
    num_maskable: Int[Tensor, " T"]


def draw_unit_patterns(unit_ids: Int[Tensor, " T"], num_samples: int, *, seed: int, position: int = 0) -> UnitPatterns:
    """Draws mask patterns of a row whose units (documents or blocks) have separate NELBOs.

    For each unit, n/m times the summed loss of its masked tokens is an unbiased estimate of its NELBO. Together the
    patterns vary less than independent ones: their counts are evenly spaced, and they mask each token about equally
    often.

    Args:
        unit_ids: 0, 1, ... in any order; -1 for tokens that are never masked.
        num_samples: S. The counts of each unit are stratified over the samples.
        seed: With `position`, all the randomness there is.
        position: Number of the row.
    """
    is_maskable = unit_ids >= 0
    num_units = int(unit_ids.amax()) + 1 if len(unit_ids) else 0
    unit = torch.where(is_maskable, unit_ids, num_units)  # tokens that are never masked count as one more unit
    size = torch.zeros(num_units + 1, dtype=torch.int64).index_add_(0, unit, torch.ones_like(unit))
    level = noise_levels(position, seed, num_samples, stratified=True, epsilon=1e-9).double()
    # The last row of numbers rotates each unit's levels, which stay evenly spaced over the samples.
    uniform = uniforms((num_samples + 1, max(len(unit), num_units + 1)), seed=seed, position=position)
    turned = (level[:, None] + uniform[-1, : num_units + 1]) % 1.0
    count = (1 + (turned * size).long()).minimum(size)
    deck, first = _deal(count, size)
    rank = _rank_in_unit(uniform[:-1, : len(unit)], unit, size).gather(0, deck[:, unit])
    num_masked = count[:, unit].masked_fill(~is_maskable, 0)
    is_masked = (rank - first[:, unit]) % size[unit] < num_masked
    return UnitPatterns(is_masked, num_masked, size[unit].masked_fill(~is_maskable, 0))


def _deal(
    count: Int[Tensor, "S units"], size: Int[Tensor, " units"]
) -> tuple[Int[Tensor, "S units"], Int[Tensor, "S units"]]:
    """Deals the tokens of each unit out like cards of a shuffled deck: a pattern takes the next `count` ones.

    When all have been dealt, the next pattern takes another deck. One that needs more cards than are left goes on from
    its deck's first card. So each pattern by itself is uniform among those of its count.

    Returns:
        Which deck each pattern takes its tokens from, and its first one there.
    """
    deck, first = torch.zeros_like(count), torch.zeros_like(count)
    used, number = torch.zeros_like(size), torch.zeros_like(size)
    for pattern, taken in enumerate(count):
        is_dealt = used >= size
        number, used = number + is_dealt, used.masked_fill(is_dealt, 0)
        deck[pattern], first[pattern] = number, used
        used = used + taken
    return deck, first


def _rank_in_unit(
    keys: Float[Tensor, "S T"], unit: Int[Tensor, " T"], size: Int[Tensor, " units"]
) -> Int[Tensor, "S T"]:
    """Returns each token's place, from 0, in its unit by the order of their keys."""
    by_key = keys.argsort(dim=1)
    by_unit_and_key = by_key.gather(1, unit[by_key].argsort(dim=1, stable=True))
    return by_unit_and_key.argsort(dim=1) - (size.cumsum(0) - size)[unit]


def nelbo_samples(
    token_log_probs: TokenLogProbs,
    is_maskable: Bool[Tensor, " T"],
    num_samples: int,
    *,
    seed: int,
    position: int = 0,
    estimator: str = "count",
) -> Float[Tensor, " S"]:
    """Returns unbiased estimates of a row's NELBO in nats, one per mask pattern; their mean is the Monte-Carlo NELBO.

    The first argument is the model as in `nelbo_exact`, which is called once with all S patterns. The others are those
    of `draw_patterns`. With stratification the mean is at least as exact as with independent samples.
    """
    patterns = draw_patterns(is_maskable, num_samples, seed=seed, position=position, estimator=estimator)
    is_masked = patterns.is_masked.to(is_maskable.device)
    return -_masked_sum(token_log_probs(is_masked), is_masked) * patterns.weight.to(is_maskable.device)


def _masked_sum(log_probs: Float[Tensor, "P T"], is_masked: Bool[Tensor, "P T"]) -> Float[Tensor, " P"]:
    # where, not a product: a model's output for an unmasked token may be infinite.
    return torch.where(is_masked, log_probs.double(), 0.0).sum(dim=1)
