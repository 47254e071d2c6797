"""The sampler settings of a call: its own, over those of the converted model."""

from __future__ import annotations

from typing import Any

from decausal.errors import UserError
from decausal.models.facts import FACTS_FILE, ConversionFacts
from decausal.sampling.settings import SamplerSettings


def settings_for(facts: ConversionFacts, **options: Any) -> SamplerSettings:
    """Returns the defaults, overridden by the facts' settings and then by `options`.

    Args:
        facts: The facts of the model to sample from.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Raises:
        UserError: A bad setting, or one that the model's layout does not support. The message says if the facts hold
            it.
    """
    try:
        stored = SamplerSettings(speculative=facts.only_drafts).updated(**facts.sampler)
        refuse_for(facts, stored)
    except UserError as error:
        raise UserError(f"{FACTS_FILE}, 'sampler': {error}") from error
    settings = stored.updated(**options)
    refuse_for(facts, settings)
    return settings


def refuse_for(facts: ConversionFacts, settings: SamplerSettings) -> None:
    """Refuses settings that a model cannot honour.

    Raises:
        UserError: Names the setting, why, and which models can.
    """
    settings.refuse_layout(facts.layout, facts.shift)
    if facts.only_drafts and not settings.speculative:
        raise UserError(
            "this model's masks draft for verified decoding alone, and speculative is false: leave it out, or convert "
            "with shared weights to denoise"
        )
    longest = longest_draft(facts)
    if settings.draft_length is not None and longest is not None and settings.draft_length > longest:
        raise UserError(
            f"draft_length={settings.draft_length} is more than this model has learnt to draft: its blocks of "
            f"{facts.block_size} hold {longest} drafts; give at most {longest}"
        )


def longest_draft(facts: ConversionFacts) -> int | None:
    """Returns how many tokens a block's masks draft. None: the model has no blocks, so any number may be tried.

    Under shift 0 the first mask stands for the token that the causal model writes itself.
    """
    return None if facts.block_size is None else facts.block_size - 1 + facts.shift
