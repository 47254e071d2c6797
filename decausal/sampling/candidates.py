"""One candidate token for each open position, from its logits and one number in (0, 1)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def choose(
    logits: Float[Tensor, "n V"],
    numbers: Float[Tensor, "n"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "n"]:
    """Draws one token per row by inverting its cumulative distribution at `numbers`; temperature 0 takes the likeliest.

    Args:
        logits: Unscaled log-probabilities. A token at -inf is never drawn.
        numbers: Uniform in (0, 1), the only source of randomness.
        temperature: Divides the logits before truncation.
        top_k: Keep the k most probable tokens.
        top_p: Of those, keep the fewest most probable ones whose probabilities sum to at least this.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = truncate(logits / temperature, top_k=top_k, top_p=top_p).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # A parallel cumulative sum may be off by an ulp: asking for p > 0 keeps impossible tokens out whatever it returns.
    is_past = (cumulative > numbers[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return torch.where(is_past.any(-1), is_past.to(torch.uint8).argmax(-1), logits.argmax(-1))


def truncate(
    logits: Float[Tensor, "n V"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "n V"]:
    """Sets to -inf what lies outside the `top_k` most probable tokens, then outside the nucleus `top_p` of the rest."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        is_past = mass_before >= top_p
        is_dropped = torch.empty_like(is_past).scatter_(1, order, is_past)
        logits = logits.masked_fill(is_dropped, -torch.inf)
    return logits


def uniform_numbers(seed: Int[Tensor, "n"], step: int, position: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Numbers in (0, 1), a function of (seed, step, position) alone: 23 bits of a chain of hashes.

    A row therefore draws the same numbers alone and in a batch, padded or not, and whenever others finish.

    Source: the finaliser of splitmix64 (Steele et al. 2014), applied once per coordinate.
    """
    bits = _mixed(_mixed(_mixed(seed) + step) + position)
    return ((bits >> 40) & (2**23 - 1)).to(torch.float32) * 2.0**-23 + 2.0**-24


def _mixed(bits: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Splitmix64's finaliser; int64 products wrap around, and its constants are written as signed numbers."""
    bits = bits + _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Int[Tensor, "n"], places: int) -> Int[Tensor, "n"]:
    """Shifts right as if unsigned: torch's shift copies the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
