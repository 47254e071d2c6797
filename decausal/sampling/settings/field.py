"""The parts of a sampler setting: its default, its accepted values, and its flag.

Nothing here imports torch, so that settings are checked before it is loaded.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from decausal.errors import UserError

COUNTS_BELOW = 2**31
"""Above any number of tokens or steps, and far enough below 2**63 for engines to compute with it."""
SMALLEST, LARGEST = 1e-20, 1e20
"""Bounds of reals above 0. In float32, with which engines compute, smaller ones would become 0 and larger ones
infinite."""

WHOLE_ROWS, BLOCKS = "whole rows", "blocks"
"""What a setting may be for: models that read in both directions and are denoised as whole rows, or models that are
written block by block. Most settings are for all."""


class Rule(NamedTuple):
    """The values that a setting accepts.

    Attributes:
        accepts: Whether a value is one of them.
        text: The values in words, as in "it must be ...".
        is_real: Whether accepted values become floats.
    """

    accepts: Callable[[Any], bool]
    text: str
    is_real: bool = False


class Flag(NamedTuple):
    """A setting on the command line.

    Attributes:
        help: One line.
        options: Options for `ArgumentParser.add_argument`.
        names: Further names. If `options` hold `dest`, the only names.
    """

    help: str
    options: Mapping[str, Any] = {}
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """The description of a setting, apart from its name, type and default.

    Attributes:
        rule: The values that it accepts, and None if that is the default.
        flags: Its flags on the command line; none if each verb has its own flag for it.
        settle: Converts other forms of a value into ours, and leaves unknown ones to the rule.
        only: `WHOLE_ROWS`, `BLOCKS`, or None if every model supports it.
        details: Settings that refine this one, and the values with which they have an effect. Otherwise they are
            dropped.
        aliases: Names that other samplers use for it.
    """

    rule: Rule
    flags: tuple[Flag, ...] = ()
    settle: Callable[[Any], Any] | None = None
    only: str | None = None
    details: tuple[tuple[str, ...], tuple[Any, ...]] = ((), ())
    aliases: tuple[str, ...] = ()


def setting(default: Any, rule: Rule, *flags: Flag, **more: Any) -> Any:
    """Returns a dataclass field with its `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(rule, flags, **more)})


def is_integer(value: object) -> bool:
    """Returns whether a value is an integer, also of numpy, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Returns whether a value is a real number and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def one_of(names: tuple[str, ...]) -> Rule:
    """Returns the rule of settings with a list of names."""
    return Rule(lambda value: value in names, f"one of {', '.join(names)}")


def amount_up_to(largest: float) -> Rule:
    """Returns the rule of settings that are off at 0."""
    return Rule(
        lambda value: is_number(value) and (value == 0 or SMALLEST <= value <= largest),
        f"0, or a number from {SMALLEST:g} to {largest:g}",
        is_real=True,
    )


WHOLE = Rule(lambda value: is_integer(value) and 0 <= value < COUNTS_BELOW, "an integer of at least 0 and below 2**31")
COUNT = Rule(lambda value: is_integer(value) and 1 <= value < COUNTS_BELOW, "an integer of at least 1 and below 2**31")
SHARE = Rule(
    lambda value: is_number(value) and SMALLEST <= value <= 1, f"a number from {SMALLEST:g} to 1", is_real=True
)
AMOUNT = amount_up_to(LARGEST)
SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")


def check(name: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Refuses a value that breaks the field's rule.

    Raises:
        UserError: Names the setting, the value and what is accepted.
    """
    rule: Rule = field.metadata["setting"].rule
    if not (rule.accepts(value) or (value is None and field.default is None)):
        raise UserError(f"{name}={_shown(value)} is not accepted: it must be {rule.text}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return "(thousands of digits)"
    return text if len(text) <= 80 else f"{text[:77]}..."
