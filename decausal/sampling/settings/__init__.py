"""The sampler's settings. Each file holds a family: fields, accepted values and contradictions.

A new setting is a field in one of these files, with its rule and its flag. `row_settings` brings it to the device if
rows of a batch may differ in it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError, nearest
from decausal.sampling.settings.drawing import NUM_SEEDS, DrawingSettings
from decausal.sampling.settings.ending import EndingSettings
from decausal.sampling.settings.field import BLOCKS, COUNTS_BELOW, WHOLE_ROWS, Setting, check
from decausal.sampling.settings.guidance import GuidanceSettings
from decausal.sampling.settings.left_to_right import DRAFTS, LeftToRightSettings
from decausal.sampling.settings.remasking import DEFAULT_REMASK_RATE, REMASKINGS, RemaskingSettings
from decausal.sampling.settings.schedules import (
    CONFIDENCES,
    DEFAULT_THRESHOLD,
    OF_STEPS,
    ORDERS,
    SCHEDULES,
    ScheduleSettings,
)
from decausal.sampling.settings.windows import CACHES, WindowSettings

__all__ = [
    "ALIASES",
    "BLOCKS",
    "CACHES",
    "CONFIDENCES",
    "COUNTS_BELOW",
    "DEFAULT_REMASK_RATE",
    "DEFAULT_THRESHOLD",
    "DRAFTS",
    "MOST_ROWS",
    "NUM_SEEDS",
    "OF_STEPS",
    "ORDERS",
    "REMASKINGS",
    "SCHEDULES",
    "SETTINGS",
    "WHOLE_ROWS",
    "SamplerSettings",
    "canonical",
    "names_for",
]

MOST_ROWS = 2**16
"""The most rows in one forward pass. An engine allocates room for all of them."""
_WHY_NOT = {
    "block": "a block model writes block by block, each from the exact cache of those before it, and what is "
    "finished is never opened again",
    "causal": "a causal model does not see what is after a token",
}


# A dataclass collects the fields of its last base first, so the order is reversed.
@dataclass(frozen=True, kw_only=True)
class SamplerSettings(
    LeftToRightSettings,
    RemaskingSettings,
    GuidanceSettings,
    WindowSettings,
    DrawingSettings,
    ScheduleSettings,
    EndingSettings,
):
    """How open positions become tokens. The settings are those of the bases.

    Raises:
        UserError: A value is outside its range, or settings exclude each other.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _settled(field.name, getattr(self, field.name)))
        self.complete()
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name), field)
        for family in reversed(type(self).__mro__):
            contradiction = vars(family).get("contradiction")
            if contradiction and (text := contradiction(self)):
                raise UserError(text)

    def refuse_layout(self, layout: str, shift: int | None = 1) -> None:
        """Refuses settings that a model of this layout and shift does not support.

        Raises:
            UserError: Names the setting, why, and which models can.
        """
        if self.verifier == "masks" and (layout != "block" or shift != 0):
            raise UserError(
                f"verifier='masks' is not possible under layout '{layout}' with shift {shift}: only in a model with "
                "layout 'block' and shift 0 does a mask predict its own token; leave it out"
            )
        for name in self.given_for_some(BLOCKS):
            if layout != "block" or shift == 0:
                raise UserError(
                    f"{name} is not possible under layout '{layout}' with shift {shift}: only in a model with layout "
                    "'block' and shift 1 does a finished token predict a block's first one; leave it out"
                )
        if layout == "bidirectional":
            return
        if layout == "causal" and self.speculative:
            raise UserError(
                "speculative decoding drafts with masks, and a model of layout 'causal' has learnt none; leave it out"
            )
        for name in self.given_for_some(WHOLE_ROWS):
            raise UserError(
                f"{name} is not possible under layout '{layout}': {_WHY_NOT[layout]}; leave it out, or sample from "
                "a model with layout 'bidirectional'"
            )

    def given_for_some(self, *kinds: str) -> list[str]:
        """Returns the settings that differ from the defaults and that only some models support, of these `kinds`."""
        names = names_for(*(kinds or (WHOLE_ROWS, BLOCKS)))
        return [name for name in names if getattr(self, name) != _DEFAULTS[name]]

    def given_for_denoising(self) -> list[str]:
        """Returns the settings that differ from the defaults and do nothing in verified decoding."""
        defaults = _DEFAULTS | {"threshold": None if self.threshold is None else DEFAULT_THRESHOLD}
        return [name for name in OF_DENOISING if getattr(self, name) != defaults[name]]

    def in_effect(self) -> dict[str, Any]:
        """Returns the settings, by name, that are not without effect beside the others."""
        idle = set(OF_DENOISING) if self.speculative else set()
        for name, setting in SETTINGS.items():
            details, values = setting.details
            if name in idle or getattr(self, name) not in values:
                idle.update(details)
        return {name: getattr(self, name) for name in SETTINGS if name not in idle}

    def updated(self, **options: Any) -> SamplerSettings:
        """Returns these settings, overridden by `options`.

        Aliases are accepted. A schedule replaces the others. If remasking or the cache is switched off, or
        `speculative` is switched on, settings without effect are dropped.

        Raises:
            UserError: An unknown name (the nearest is named), one setting given under two names, or a bad value.
        """
        changes = canonical(options)
        if any(changes.get(name) is not None for name in SCHEDULES):
            changes = dict.fromkeys(SCHEDULES) | changes
        changes = {name: _settled(name, value) for name, value in changes.items()}
        if changes.get("speculative") is True:
            for name in OF_DENOISING:
                for dropped in (name, *SETTINGS[name].details[0]):
                    changes.setdefault(dropped, _DEFAULTS[dropped])
        for name, setting in SETTINGS.items():
            details, values = setting.details
            if name in changes and changes[name] not in values:
                for detail in details:
                    changes.setdefault(detail, _DEFAULTS[detail])
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name, value in changes.items():
            check(name, value, fields[name])
            changes[name] = float(value) if SETTINGS[name].rule.is_real and value is not None else value
        return dataclasses.replace(self, **changes)


def names_for(*kinds: str) -> list[str]:
    """Returns the settings that only some models support: `WHOLE_ROWS`, `BLOCKS` or both."""
    return [name for name, setting in SETTINGS.items() if setting.only in kinds]


def canonical(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options under our names."""
    renamed: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in SETTINGS:
            hint = nearest(given, SETTINGS.keys() | ALIASES.keys()) or f"; accepted: {', '.join(sorted(SETTINGS))}"
            raise UserError(f"unknown sampler setting '{given}'{hint}")
        if name in renamed:
            raise UserError(f"{name} is given twice: '{given}' is another name for it")
        renamed[name] = value
    return renamed


def _settled(name: str, value: Any) -> Any:
    settle = SETTINGS[name].settle
    return value if settle is None else settle(value)


SETTINGS: dict[str, Setting] = {field.name: field.metadata["setting"] for field in dataclasses.fields(SamplerSettings)}
"""Every setting's description, by name."""
OF_DENOISING = (*names_for(WHOLE_ROWS, BLOCKS), *OF_STEPS)
"""Settings of models or steps that denoise. They do nothing in verified decoding."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplerSettings)}
ALIASES = {alias: name for name, setting in SETTINGS.items() for alias in setting.aliases}
"""Other samplers' names, and ours for them."""
