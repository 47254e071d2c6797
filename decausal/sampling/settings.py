"""The sampler's settings: names, defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError, nearest
from decausal.sampling.confidence import CONFIDENCES

DEFAULT_THRESHOLD = 0.9

ALIASES = {
    "confidence_threshold": "threshold",
    "denoising_steps": "num_steps",
    "gen_length": "max_new_tokens",
    "num_denoising_steps": "num_steps",
    "remasking": "remask",
    "steps": "num_steps",
}
"""Names that other samplers use, and ours."""


@dataclass(frozen=True)
class SamplerSettings:
    """How open positions become tokens.

    Attributes:
        max_new_tokens: Open positions after a prompt.
        num_steps: Static schedule: a row's open positions are kept in this many steps, spread evenly (one per step
            where there are fewer positions than steps). Excludes `threshold`.
        threshold: Dynamic schedule: a step keeps every position at least this confident, and at least one per row.
            Where neither is given it is 0.9.
        confidence: "probability", "margin" or "entropy": see `decausal.sampling.confidence`.
        temperature: 0 takes the most probable token. Positions are ordered by the untempered distribution throughout.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the fewest tokens whose probabilities sum to this.
        seed: Row i of a call draws from seed + i, so one row can be had again alone.
        remask: Every step scores all positions that were not given anew, a kept token by its own probability now, and
            may open kept positions again in favour of better ones; what is kept grows every step.
            Source: P2 (arXiv 2502.03540), with the model as its own planner.

    Raises:
        UserError: A value outside its range, or both schedules.
    """

    max_new_tokens: int = 128
    num_steps: int | None = None
    threshold: float | None = None
    confidence: str = "probability"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    remask: bool = False

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.threshold is not None:
            raise UserError(
                f"num_steps={self.num_steps} and threshold={self.threshold} exclude each other: give num_steps for a "
                "fixed number of steps, or threshold to keep whatever is sure enough"
            )
        if self.num_steps is None and self.threshold is None:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    def updated(self, **options: Any) -> SamplerSettings:
        """Returns these settings with `options` over them; aliases are understood, either schedule replaces the other.

        Raises:
            UserError: An unknown name (the nearest is named), one setting given under two names, or a bad value.
        """
        changes = canonical(options)
        if changes.get("num_steps") is not None:
            changes.setdefault("threshold", None)
        if changes.get("threshold") is not None:
            changes.setdefault("num_steps", None)
        for name, value in changes.items():
            _check(name, value)
            changes[name] = float(value) if name in _REAL and value is not None else value
        return dataclasses.replace(self, **changes)


def canonical(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options under our names for them."""
    accepted = {field.name for field in dataclasses.fields(SamplerSettings)}
    renamed: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in accepted:
            hint = nearest(given, accepted | ALIASES.keys()) or f"; accepted: {', '.join(sorted(accepted))}"
            raise UserError(f"unknown sampler setting '{given}'{hint}")
        if name in renamed:
            raise UserError(f"{name} is given twice: '{given}' is another name for it")
        renamed[name] = value
    return renamed


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_REAL = ("threshold", "temperature", "top_p")
_OPTIONAL = ("num_steps", "threshold", "top_k", "top_p")
_RULES = {
    "max_new_tokens": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "num_steps": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "threshold": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "confidence": (lambda value: value in CONFIDENCES, f"one of {', '.join(CONFIDENCES)}"),
    "temperature": (lambda value: _is_number(value) and 0 <= value < float("inf"), "a number of at least 0"),
    "top_k": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "seed": (lambda value: _is_integer(value) and 0 <= value < 2**62, "an integer of at least 0 and below 2**62"),
    "remask": (lambda value: isinstance(value, bool), "True or False"),
}


def _check(name: str, value: Any) -> None:
    is_accepted, accepted = _RULES[name]
    if not (is_accepted(value) or (value is None and name in _OPTIONAL)):
        raise UserError(f"{name}={value!r} is not accepted: it must be {accepted}")
