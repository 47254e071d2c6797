"""Writing from left to right: block models, and self-speculation."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decausal.errors import UserError
from decausal.sampling.settings.field import BLOCKS, SWITCH, Flag, setting

if TYPE_CHECKING:
    from decausal.sampling.settings import SamplerSettings


@dataclass(frozen=True, kw_only=True)
class LeftToRightSettings:
    """How rows are written from left to right.

    Attributes:
        first_token_from_clean: A block's first token is kept in a step of its own, from the state of the finished token
            before it; the others are decided when it is known. Of models with layout "block" and shift 1. That step is
            the first of `num_steps`; where there is only one, a second follows. Source: Fast-dLLM v2
            (arXiv 2509.26328), its code.
        speculative: Write what the same weights write under causal attention: masks draft several tokens, and the same
            pass verifies those drafted before. Temperature, top_k, top_p and min_p hold; schedules play no part. See
            `decausal.sampling.blocks.speculative`.
    """

    first_token_from_clean: bool = setting(
        False,
        SWITCH,
        Flag(
            "keep a block's first token before the others are decided, as Fast-dLLM v2 does",
            {"action": argparse.BooleanOptionalAction},
        ),
        only=BLOCKS,
    )
    speculative: bool = setting(
        False,
        SWITCH,
        Flag("masks draft what the same weights verify causally", {"action": "store_true", "default": None}),
    )

    def contradiction(self: SamplerSettings) -> str | None:
        """What these settings contradict, in words."""
        unused = self.given_for_some()
        if self.speculative and unused:
            return (
                f"{unused[0]} does nothing in speculative decoding, which writes from left to right; leave one of "
                "them out"
            )
        return None

    def refuse_speculative(self) -> None:
        """Refuses self-speculation where rows are denoised.

        Raises:
            UserError: It was asked for.
        """
        if self.speculative:
            raise UserError(
                "speculative is for continuing prompts: it writes from left to right, without steps of denoising; "
                "leave it out"
            )
