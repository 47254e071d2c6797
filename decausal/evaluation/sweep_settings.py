"""Which sampler settings a sweep tries. This file is light: the command line checks them before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError
from decausal.models.facts import ConversionFacts
from decausal.sampling.settings import OF_STEPS, SETTINGS, canonical
from decausal.sampling.settings.of_model import longest_draft, settings_for

AR, VERIFIED, BLOCK_SIZE = "AR", "verified", "block_size"
OF_DRAFTS = ("draft", "draft_length", "verifier")
THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Tried:
    """One setting of a sweep.

    Attributes:
        series: The line that it belongs to: the name of the setting that is swept, or "verified".
        options: Sampler settings by name; "block_size" too, which stands in for the model's own.
    """

    series: str
    options: dict[str, Any]


def tried_settings(facts: ConversionFacts, over: Sequence[str], fixed: dict[str, Any]) -> list[Tried]:
    """Reads what to try.

    Args:
        facts: The model's facts.
        over: Each NAME=VALUE,VALUE,... is a line of its own. If there are none: thresholds for a model that denoises,
            and verified decoding if it is possible, which stands beside other lines once.
        fixed: Sampler settings that hold throughout.

    Raises:
        UserError: There is no such setting, or the model cannot honour a value.
    """
    found = [tried for line in over for tried in _line(line, fixed)]
    if not found:
        if not facts.only_drafts:
            found = [_tried("threshold", value, fixed) for value in THRESHOLDS]
        found += _verified(facts, fixed)
    elif not any(tried.series in (*OF_DRAFTS, "speculative") or tried.options.get("speculative") for tried in found):
        found += _verified(facts, fixed)[:1]
    for tried in found:
        options = {name: value for name, value in tried.options.items() if name != BLOCK_SIZE}
        settings_for(facts, **options)
        if BLOCK_SIZE in tried.options and facts.layout != "block":
            raise UserError(f"--over block_size: only a model of layout 'block' has one, not '{facts.layout}'")
    return found


def _line(line: str, fixed: dict[str, Any]) -> list[Tried]:
    name, equals, values = line.partition("=")
    if not equals or not values:
        raise UserError(f"--over {line}: write NAME=VALUE,VALUE,... such as threshold=0.5,0.7,0.9")
    if name == BLOCK_SIZE:
        return [Tried(name, fixed | {name: _block_size(value)}) for value in values.split(",")]
    (name,) = canonical({name: None})
    return [_tried(name, _value(value), fixed) for value in values.split(",")]


def _tried(name: str, value: Any, fixed: dict[str, Any]) -> Tried:
    """Returns a value of a setting, with the decoding in which it does something."""
    needed = {"speculative": name in OF_DRAFTS} if name in (*OF_DRAFTS, *OF_STEPS) else {}
    return Tried(name, {**needed, **fixed, name: value})


def _block_size(value: str) -> int:
    if not value.isdigit() or value == "0":
        raise UserError(f"--over block_size={value}: give whole numbers of at least 1")
    return int(value)


def _value(written: str) -> Any:
    """Returns a number, true, false or null, or else the word itself."""
    try:
        return json.loads(written)
    except ValueError:
        return written


def _verified(facts: ConversionFacts, fixed: dict[str, Any]) -> list[Tried]:
    """Returns verified decoding, if the model can do it: with drafts that it chooses itself, and with each number of
    drafts."""
    plain = {name: value for name, value in fixed.items() if SETTINGS[name].only is None and name not in OF_STEPS}
    options = plain | {"speculative": True}
    try:
        settings_for(facts, **options)
    except UserError:
        return []
    lengths = [length for length in (1, 2, 4, 8) if length <= (longest_draft(facts) or 4)]
    of_lengths = [Tried(VERIFIED, options | {"draft": "quadratic", "draft_length": length}) for length in lengths]
    return [Tried(VERIFIED, options), *of_lengths]
