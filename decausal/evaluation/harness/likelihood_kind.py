"""Which likelihood a converted model's scores are made of."""

from __future__ import annotations

from decausal.errors import UserError, nearest
from decausal.evaluation.continuations.scored import LIKELIHOODS
from decausal.models.checkpoint import ConversionFacts


def likelihood_kind(facts: ConversionFacts, wanted: str = "auto") -> str:
    """Returns "causal" or "nelbo".

    Args:
        facts: Of the model.
        wanted: "nelbo"; "causal", the likelihood of the text that the same weights write from left to right, as
            speculative decoding does; "auto": causal where that is what the model is, in blocks of one token with shift
            1 or under layout causal, else the NELBO.

    Raises:
        UserError: For another word.
    """
    if wanted not in LIKELIHOODS:
        raise UserError(f"likelihood '{wanted}' is not known{nearest(wanted, LIKELIHOODS)}; one of {LIKELIHOODS}")
    if wanted != "auto":
        return wanted
    reads_to_the_right = facts.layout == "causal" or facts.block_size == 1
    return "causal" if reads_to_the_right and facts.shift == 1 else "nelbo"
