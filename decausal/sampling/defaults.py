"""A converted model's own sampler settings, with what a call asks for over them."""

from __future__ import annotations

from typing import Any

from decausal.errors import UserError
from decausal.models.facts import FACTS_FILE, ConversionFacts
from decausal.sampling.settings import SamplerSettings


def settings_for(facts: ConversionFacts, **options: Any) -> SamplerSettings:
    """Returns the defaults, the facts' settings over them, and `options` over both.

    Args:
        facts: Of the model that is to be sampled from.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Raises:
        UserError: A bad setting, or one that the model's layout cannot honour; where the facts hold it, they are named.
    """
    try:
        stored = SamplerSettings().updated(**facts.sampler)
        stored.refuse_layout(facts.layout, facts.shift)
    except UserError as error:
        raise UserError(f"{FACTS_FILE}, 'sampler': {error}") from error
    settings = stored.updated(**options)
    settings.refuse_layout(facts.layout, facts.shift)
    return settings
