"""The kind of likelihood for a converted model's scores."""

from __future__ import annotations

from decausal.errors import UserError, nearest
from decausal.evaluation.continuations.scored import LIKELIHOODS
from decausal.models.checkpoint import ConversionFacts


def likelihood_kind(facts: ConversionFacts, wanted: str = "auto") -> str:
    """Returns "causal" or "nelbo".

    Args:
        facts: The model's facts.
        wanted: "nelbo", "causal" or "auto". "causal" is the likelihood when the same weights write from left to right,
            as in speculative decoding. "auto" is causal for causal models (blocks of one token with shift 1, layout
            causal, or masks that only draft), else the NELBO.

    Raises:
        UserError: For any other word, or the NELBO of a model whose masks only draft.
    """
    if wanted not in LIKELIHOODS:
        raise UserError(f"likelihood '{wanted}' is not known{nearest(wanted, LIKELIHOODS)}; one of {LIKELIHOODS}")
    if wanted == "nelbo" and facts.only_drafts:
        raise UserError("this model's masks draft and do not denoise, so it has no NELBO; its likelihood is causal")
    if wanted != "auto":
        return wanted
    reads_to_the_right = facts.layout == "causal" or facts.block_size == 1 or facts.only_drafts
    return "causal" if reads_to_the_right and facts.shift == 1 else "nelbo"
