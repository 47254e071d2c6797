"""Guidance away from what the model writes without the given text."""

from __future__ import annotations

from dataclasses import dataclass

from decausal.sampling.settings.field import WHOLE_ROWS, Flag, amount_up_to, setting

LARGEST_GUIDANCE = 1e6
"""A logit times this over the smallest temperature is still finite in float32."""


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """How strongly rows follow the given text.

    Attributes:
        guidance: The w in logits = without + (1 + w) (with - without), "without" from the same row with all given
            tokens masked. Above 0, each step costs a second pass. Source: LLaDA (arXiv 2502.09992), after Ho and
            Salimans 2022.
    """

    guidance: float = setting(
        0.0,
        amount_up_to(LARGEST_GUIDANCE),
        Flag("move away from what the model would write without the prompt (0)", {"type": float}),
        only=WHOLE_ROWS,
    )
