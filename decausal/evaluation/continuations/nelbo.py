"""A lower bound on the likelihood of continuations under a masked model: its negative NELBO.

The context is given and the continuation is masked. Under a bidirectional layout the continuation is denoised as a
whole. Under a block layout it is denoised block by block, each with everything before it clean, including the context's
part of the first block. The estimate is that of `decausal.diffusion.nelbo`, and exact for few mask patterns.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.evaluation.continuations.scored import Continuation, Scored, in_parts, longest_first, padded
from decausal.evaluation.passes import device_of, measuring, noised_states
from decausal.evaluation.patterns import WeightedPatterns, weighted_patterns
from decausal.models.backbone import denoising_head
from decausal.models.checkpoint import ConversionFacts, Converted
from decausal.sampling.scoring import score_states

LONGEST_PASS = 16384
"""Approximate number of tokens of a request's noised views in one pass. More are read in several passes."""


class _Piece(NamedTuple):
    """Some of a request's mask patterns, for one pass."""

    index: int
    patterns: slice


def score_by_nelbo(
    converted: Converted, requests: Sequence[Continuation], *, num_samples: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[int, Scored]]:
    """Yields (index, bound on the log-likelihood) of each request, in any order.

    Masks are a function of (seed, tokens of the request). The model, other requests and their order do not matter.

    Args:
        converted: Model, tokenizer and facts.
        requests: The continuations.
        num_samples: Mask patterns per request. If it reaches the number of all patterns, the bound is exact.
        batch_size: Requests in the model at once. It changes the scores only by rounding.
        seed: Seed of the masks.
    """
    for batch in in_parts(longest_first(requests), batch_size):
        asked = [requests[index] for index in batch]
        patterns = [_patterns(request, converted.facts, num_samples, seed) for request in asked]
        losses = [torch.zeros_like(each.weight) for each in patterns]
        with measuring(converted.model):  # closed before a yield, so that the caller's code has gradients
            for pieces in _passes(asked, patterns):
                _add_losses(converted, asked, patterns, losses, pieces)
        for index, each, loss in zip(batch, patterns, losses, strict=True):
            yield index, _estimate(each, loss)


def units_of(request: Continuation, facts: ConversionFacts) -> Int[Tensor, " T"]:
    """Returns the unit with which each token is denoised: 0, 1, ... from left to right in the continuation; -1 in the
    context."""
    start, end = len(request.context), len(request.context) + len(request.tokens)
    position = torch.arange(end)
    unit = torch.zeros_like(position) if facts.block_size is None else position // facts.block_size
    return torch.where(position >= start, unit - unit[start], -1)


def _patterns(request: Continuation, facts: ConversionFacts, num_samples: int, seed: int) -> WeightedPatterns:
    position = zlib.crc32(array("q", request.ids).tobytes(), len(request.context))
    return weighted_patterns(units_of(request, facts), num_samples, seed=seed, position=position)


def _passes(asked: Sequence[Continuation], patterns: Sequence[WeightedPatterns]) -> Iterator[list[_Piece]]:
    """Yields all patterns of all requests in passes of bounded size."""
    at_once = max(1, LONGEST_PASS // max(len(request.ids) for request in asked))
    for start in range(0, max(len(each.is_masked) for each in patterns), at_once):
        part = slice(start, start + at_once)
        yield [_Piece(index, part) for index, each in enumerate(patterns) if len(each.is_masked) > start]


def _add_losses(
    converted: Converted,
    asked: Sequence[Continuation],
    patterns: Sequence[WeightedPatterns],
    losses: Sequence[Tensor],
    pieces: Sequence[_Piece],
) -> None:
    """Writes the losses of masked tokens into `losses`, in place."""
    model, _, facts = converted
    clean_ids, document_ids = padded([asked[piece.index].ids for piece in pieces])
    masks = [patterns[piece.index].is_masked[piece.patterns] for piece in pieces]
    is_masked = torch.zeros(len(pieces), max(map(len, masks)), clean_ids.shape[1], dtype=torch.bool)
    for row, mask in enumerate(masks):
        is_masked[row, : mask.shape[0], : mask.shape[1]] = mask
    states = noised_states(model, facts, clean_ids, document_ids, is_masked)
    targets = clean_ids[:, None].expand_as(is_masked)[is_masked].to(device_of(model))
    head = denoising_head(model, facts.mask_token_id)
    log_probs = score_states(states, head, targets).log_prob.double()
    for piece, mask, part in zip(pieces, masks, log_probs.split([int(mask.sum()) for mask in masks]), strict=True):
        losses[piece.index][piece.patterns][mask] = -part


def _estimate(patterns: WeightedPatterns, losses: Float[Tensor, "S T"]) -> Scored:
    weighted = losses * patterns.weight
    num_samples = len(weighted)
    drawn = weighted[:, ~patterns.is_exact].sum(dim=1)
    standard_error = 0.0
    if _has_drawn(patterns):
        standard_error = math.nan if num_samples < 2 else float(drawn.std() / math.sqrt(num_samples))
    return Scored(-float(weighted.sum() / num_samples), standard_error)


def _has_drawn(patterns: WeightedPatterns) -> Bool[Tensor, ""] | bool:
    return bool(patterns.is_masked[:, ~patterns.is_exact].any())
