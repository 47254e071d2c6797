"""Checks the settings of a job of answers before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from decausal.errors import UserError
from decausal.models.facts import ConversionFacts
from decausal.sampling.settings import SETTINGS, SamplerSettings
from decausal.sampling.settings.drawing import DrawingSettings
from decausal.sampling.settings.ending import EndingSettings

MAX_NEW_TOKENS = 512
TRUNCATED = ("keep", "drop")
STOPS = ("stop", "stop_token_ids")
"""Settings that a job of answers refuses: an answer that they ended could not be told from a whole one."""
_OF_SOURCES = {field.name for family in (DrawingSettings, EndingSettings) for field in fields(family)}


def check_options(facts: ConversionFacts | None, options: Mapping[str, Any], num_answers: int = 1) -> None:
    """Refuses settings under which a model would not write what was asked for.

    Args:
        facts: The model's facts; None for an AR model.
        options: The sampler settings that were given, by name.
        num_answers: Answers to each prompt.

    Raises:
        UserError: Names the setting, and why.
    """
    if facts is None or facts.layout == "causal":
        for name in options:
            if name in SETTINGS and name not in _OF_SOURCES:
                raise UserError(
                    f"{name} is for converted models, and this is an AR model, which writes one token with every pass: "
                    "leave it out"
                )
        SamplerSettings().updated(**{name: options[name] for name in options if name in SETTINGS})
    stored = {} if facts is None else facts.sampler
    if num_answers > 1 and not (options.get("temperature") or stored.get("temperature")):
        raise UserError(
            f"num_answers {num_answers} at temperature 0 writes the same answer {num_answers} times: give --temperature"
        )
