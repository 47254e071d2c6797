"""The sampler's settings: names, defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError, nearest

CONFIDENCES = ("probability", "margin", "entropy")
SCHEDULES = ("num_steps", "threshold", "entropy_bound")
"""Of these a row follows one."""
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
            where there are fewer positions than steps). For block models: the open positions of each block.
        threshold: Dynamic schedule: a step keeps every position at least this confident, and at least one per row.
            Where no schedule is given it is 0.9.
        entropy_bound: Dynamic schedule, in nats: a step keeps positions in the order of their entropies, the lowest
            first, while those of all but the last sum to at most this: a bound on what is lost by drawing them
            independently. 0 keeps one per row. Source: EB-sampler (arXiv 2505.24857), entropy as the proxy for error.
            The three schedules exclude each other.
        confidence: "probability", "margin" or "entropy": see `decausal.sampling.confidence`.
        temperature: 0 takes the most probable token. Positions are ordered by the untempered distribution throughout.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the fewest tokens whose probabilities sum to this.
        seed: Row i of a call draws from seed + i, so one row can be had again alone.
        remask: Every step scores all positions that were not given anew, a kept token by its own probability now, and
            may open kept positions again in favour of better ones; what is kept grows every step. Not for block
            models, and not with `entropy_bound`. Source: P2 (arXiv 2502.03540), with the model as its own planner.
        stop: Texts that end a row; the text stops before them. One string, or several.
        speculative: Write what the same weights write under causal attention: masks draft several tokens, and the same
            pass verifies those drafted before. Temperature, top_k and top_p hold; schedules play no part. See
            `decausal.sampling.speculative`.

    Raises:
        UserError: A value outside its range, or settings that exclude each other.
    """

    max_new_tokens: int = 128
    num_steps: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    confidence: str = "probability"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    remask: bool = False
    stop: tuple[str, ...] = ()
    speculative: bool = False

    def __post_init__(self) -> None:
        given = [name for name in SCHEDULES if getattr(self, name) is not None]
        if len(given) > 1:
            values = " and ".join(f"{name}={getattr(self, name)}" for name in given)
            raise UserError(
                f"{values} exclude each other: give num_steps for a fixed number of steps, threshold to keep whatever "
                "is sure enough, or entropy_bound to keep what is nearly independent"
            )
        if not given:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        object.__setattr__(self, "stop", _as_texts(self.stop))
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))
        if self.remask and self.entropy_bound is not None:
            raise UserError(
                "remask and entropy_bound exclude each other: the bound speaks of positions that are open; "
                "give num_steps or threshold with remask"
            )

    def refuse_speculative(self) -> None:
        """Refuses self-speculation where rows are denoised.

        Raises:
            UserError: It was asked for.
        """
        if self.speculative:
            raise UserError(
                "speculative is for continuing prompts by `generate` alone: it writes from left to right, without "
                "steps of denoising; leave it out"
            )

    @property
    def schedule(self) -> str:
        """The one of `SCHEDULES` that is followed."""
        return next(name for name in SCHEDULES if getattr(self, name) is not None)

    def updated(self, **options: Any) -> SamplerSettings:
        """Returns these settings with `options` over them; aliases are understood, a schedule replaces the others.

        Raises:
            UserError: An unknown name (the nearest is named), one setting given under two names, or a bad value.
        """
        changes = canonical(options)
        if any(changes.get(name) is not None for name in SCHEDULES):
            changes = dict.fromkeys(SCHEDULES) | changes
        if "stop" in changes:
            changes["stop"] = _as_texts(changes["stop"])
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


def _as_texts(stop: Any) -> Any:
    """One text or a list of them as a tuple; anything else is left for the check to refuse."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop) if isinstance(stop, list) else stop


_REAL = ("threshold", "entropy_bound", "temperature", "top_p")
_OPTIONAL = (*SCHEDULES, "top_k", "top_p")
_RULES = {
    "max_new_tokens": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "num_steps": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "threshold": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "entropy_bound": (lambda value: _is_number(value) and 0 <= value < float("inf"), "a number of at least 0"),
    "confidence": (lambda value: value in CONFIDENCES, f"one of {', '.join(CONFIDENCES)}"),
    "temperature": (lambda value: _is_number(value) and 0 <= value < float("inf"), "a number of at least 0"),
    "top_k": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "seed": (lambda value: _is_integer(value) and 0 <= value < 2**62, "an integer of at least 0 and below 2**62"),
    "remask": (lambda value: isinstance(value, bool), "True or False"),
    "stop": (
        lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
        "a text that is not empty, or several",
    ),
    "speculative": (lambda value: isinstance(value, bool), "True or False"),
}


def _check(name: str, value: Any) -> None:
    is_accepted, accepted = _RULES[name]
    if not (is_accepted(value) or (value is None and name in _OPTIONAL)):
        raise UserError(f"{name}={value!r} is not accepted: it must be {accepted}")
