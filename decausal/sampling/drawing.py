"""Draws one token for each open position, from its logits and one number in (0, 1)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decausal.sampling.settings.drawing import NUM_SEEDS


def choose(
    logits: Float[Tensor, "n V"],
    numbers: Float[Tensor, " n"],
    *,
    temperature: float | Float[Tensor, " n"],
    top_k: int | Int[Tensor, " n"] | None = None,
    top_p: float | Float[Tensor, " n"] | None = None,
    min_p: float | Float[Tensor, " n"] | None = None,
    most: int | None = None,
) -> Int[Tensor, " n"]:
    """Draws one token per row by inverting the cumulative distribution at `numbers`. Temperature 0 takes the likeliest.

    Each setting is one for all rows, or one per row. A row's token does not depend on the settings of others.

    Args:
        logits: Unscaled log-probabilities. A token at -inf is never drawn.
        numbers: Uniform in (0, 1), the only source of randomness.
        temperature: Divides the logits before truncation.
        top_k: Keep the k most probable tokens. Per row: 0 keeps all.
        top_p: Of those, keep the fewest most probable tokens whose probabilities sum to at least this. Per row: 1 or
            more keeps all.
        min_p: First, before the temperature, keep tokens at least this many times as probable as the likeliest. Per
            row: 0 keeps all.
        most: The largest of several `top_k`, so that the host need not ask the device for it.
    """
    if isinstance(temperature, int | float):
        if temperature == 0:
            return logits.argmax(-1)
        return _drawn(truncate(above(logits, min_p) / temperature, top_k=top_k, top_p=top_p, most=most), numbers)
    is_drawn = temperature > 0
    tempered = above(logits, min_p) / torch.where(is_drawn, temperature, 1.0)[:, None].to(logits.dtype)
    return torch.where(
        is_drawn, _drawn(truncate(tempered, top_k=top_k, top_p=top_p, most=most), numbers), logits.argmax(-1)
    )


def _drawn(logits: Float[Tensor, "n V"], numbers: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # A parallel cumulative sum may be off by an ulp. The condition p > 0 excludes impossible tokens in any case.
    is_past = (cumulative > numbers[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return torch.where(is_past.any(-1), is_past.to(torch.uint8).argmax(-1), logits.argmax(-1))


def above(logits: Float[Tensor, "n V"], min_p: float | Float[Tensor, " n"] | None) -> Float[Tensor, "n V"]:
    """Sets tokens to -inf that are less probable than `min_p` times the likeliest. Source: arXiv 2407.01082."""
    if min_p is None:
        return logits
    share = min_p[:, None] if isinstance(min_p, Tensor) else torch.tensor(min_p)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + share.log(), -torch.inf)


def truncate(
    logits: Float[Tensor, "n V"],
    *,
    top_k: int | Int[Tensor, " n"] | None = None,
    top_p: float | Float[Tensor, " n"] | None = None,
    most: int | None = None,
) -> Float[Tensor, "n V"]:
    """Sets tokens to -inf outside the `top_k` most probable ones, then outside the nucleus `top_p` of the rest."""
    if top_k is not None:
        logits = _only_top(logits, top_k, most)
    if top_p is not None and (isinstance(top_p, Tensor) or top_p < 1):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        if isinstance(top_p, Tensor):
            is_past = (mass_before >= top_p[:, None]) & (top_p < 1)[:, None]
        else:
            is_past = mass_before >= top_p
        is_dropped = torch.empty_like(is_past).scatter_(1, order, is_past)
        logits = logits.masked_fill(is_dropped, -torch.inf)
    return logits


def _only_top(logits: Float[Tensor, "n V"], k: int | Int[Tensor, " n"], most: int | None) -> Float[Tensor, "n V"]:
    vocab_size = logits.shape[-1]
    if not isinstance(k, Tensor):
        return (
            logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], -torch.inf) if k < vocab_size else logits
        )
    most = min(vocab_size, int(k.max()) if most is None else most)
    if most == 0:
        return logits
    smallest_kept = logits.topk(most, dim=-1).values.gather(1, (k[:, None] - 1).clamp(0, most - 1))
    return logits.masked_fill((logits < smallest_kept) & (k > 0)[:, None] & (k < vocab_size)[:, None], -torch.inf)


def uniform_numbers(
    seed: Int[Tensor, " n"], step: int | Int[Tensor, " n"], position: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Returns numbers in (0, 1), a function of (seed, step, position) only: 23 bits of a chain of hashes.

    So a row draws the same numbers alone and in a batch, padded or not, and whenever others finish. Seeds are taken
    modulo `NUM_SEEDS`, so that a call's seeds continue from 0 after the last one.

    Source: the finaliser of splitmix64 (Steele et al. 2014), once per coordinate.
    """
    bits = _mixed(_mixed(_mixed(seed & (NUM_SEEDS - 1)) + step) + position)
    return ((bits >> 40) & (2**23 - 1)).to(torch.float32) * 2.0**-23 + 2.0**-24


def _mixed(bits: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Applies splitmix64's finaliser. Products of int64 wrap around, and the constants are written as signed
    numbers."""
    bits = bits + _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Int[Tensor, " n"], places: int) -> Int[Tensor, " n"]:
    """Shifts right as if unsigned, because torch's shift copies the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
