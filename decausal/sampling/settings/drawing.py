"""Which token a position gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decausal.sampling.settings.field import AMOUNT, COUNT, SHARE, Flag, Rule, amount_up_to, is_integer, setting

NUM_SEEDS = 2**62
"""Number of different seeds. Any integer counts modulo this."""


def _as_seed(seed: Any) -> Any:
    return int(seed) % NUM_SEEDS if is_integer(seed) else seed


@dataclass(frozen=True, kw_only=True)
class DrawingSettings:
    """Which token a position gets.

    Attributes:
        temperature: 0 takes the most probable token. Positions are ordered by the untempered distribution throughout.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the fewest tokens whose probabilities sum to this.
        min_p: Sample only among tokens at least this many times as probable as the likeliest one, before temperature,
            so that a high temperature admits no others. Applied before `top_k` and `top_p`.
        seed: Row i of a call draws from seed + i, so one row can be repeated alone. Any integer, taken modulo 2**62.
    """

    temperature: float = setting(0.0, AMOUNT, Flag("0 takes the most probable token (0)", {"type": float}))
    top_k: int | None = setting(None, COUNT, Flag("draw among this many of the most probable tokens", {"type": int}))
    top_p: float | None = setting(
        None, SHARE, Flag("draw among the fewest tokens with this probability", {"type": float})
    )
    min_p: float | None = setting(
        None, amount_up_to(1.0), Flag("least probability, as a share of the likeliest token's", {"type": float})
    )
    seed: int = setting(
        0,
        Rule(is_integer, "an integer"),
        Flag("the same seed writes the same text; text i draws from seed + i (0)", {"type": int}),
        settle=_as_seed,
    )
