"""Settings for writing from left to right: block models and self-speculation."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decausal.errors import UserError
from decausal.sampling.settings.field import BLOCKS, SWITCH, WHOLE, Flag, one_of, setting

if TYPE_CHECKING:
    from decausal.sampling.settings import SamplerSettings

DRAFTS = ("auto", "quadratic", "strided", "linear")
VERIFIERS = ("causal", "masks")


@dataclass(frozen=True, kw_only=True)
class LeftToRightSettings:
    """How rows are written from left to right.

    Attributes:
        first_token_from_clean: A block's first token is kept in a separate step, from the state of the finished token
            before it. The others are decided when it is known. For models with layout "block" and shift 1. That step is
            the first of `num_steps`; if there is only one, a second follows. Source: Fast-dLLM v2 (arXiv 2509.26328),
            its code.
        speculative: Write what the same weights write under causal attention. Masks draft several tokens, and the same
            pass verifies the earlier drafts. Temperature, top_k, top_p and min_p apply; schedules do not. See
            `decausal.sampling.blocks.speculative`.
        draft: The tokens that a pass of speculative decoding drafts; the text is the same for all. "quadratic": after
            every number of right drafts; "strided": only after all drafts; "linear": in separate passes; "auto": what
            is fastest here, by measured acceptances and times.
        draft_length: Tokens drafted at once; for "auto" the most. 0: none, so that each pass writes one token. None: as
            many as the model was trained to draft, or 4 where that is not known.
        verifier: What speculative decoding writes. "causal": what the states of known tokens predict, as in an
            autoregressive model. "masks": what the model writes in blocks of one token, each a mask after the known
            tokens. "masks" is for models of layout "block" and shift 0 whose known tokens were never trained to
            predict. Source: S2D2 (arXiv 2603.25702).
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
        Flag("masks draft what the same weights verify causally", {"action": argparse.BooleanOptionalAction}),
        details=(("draft", "draft_length", "verifier"), (True,)),
    )
    draft: str = setting(
        "auto", one_of(DRAFTS), Flag("which tokens a pass of --speculative drafts (auto)", {"choices": DRAFTS})
    )
    draft_length: int | None = setting(
        None, WHOLE, Flag("tokens that --speculative drafts at once; 0: none", {"type": int})
    )
    verifier: str = setting(
        "causal", one_of(VERIFIERS), Flag("what decides which drafts are right (causal)", {"choices": VERIFIERS})
    )

    def contradiction(self: SamplerSettings) -> str | None:
        """Returns what these settings contradict, in words."""
        unused = self.given_for_denoising()
        if self.speculative and unused:
            return (
                f"{unused[0]} does nothing in speculative decoding, which writes from left to right; leave it out, or "
                "denoise: speculative false (--no-speculative)"
            )
        for name in ("draft", "draft_length"):
            value = getattr(self, name)
            if not self.speculative and value != getattr(LeftToRightSettings, name):
                return f"{name}={value!r} is for speculative decoding; give speculative too, or leave it out"
        return None

    def refuse_speculative(self) -> None:
        """Refuses self-speculation if rows are denoised.

        Raises:
            UserError: It was asked for.
        """
        if self.speculative:
            raise UserError(
                "speculative is for continuing prompts: it writes from left to right, without steps of denoising; "
                "leave it out"
            )
