"""Settings as fields with their help, families of settings, and the checks that several of them need.

This file is light: the command line reads settings to print its help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from decausal.errors import UserError


def setting(default: Any, help_text: str) -> Any:
    """Returns a dataclass field with its help, which the command line prints."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Family:
    """Settings that belong together. Its docstring's first line is their heading in the reference.

    A family inherits those whose settings its own may contradict.
    """

    def check(self) -> None:
        """Refuses values outside their ranges, and contradictions.

        Raises:
            UserError: Names the setting, its value and what to give instead.
        """

    def check_facts(self) -> None:
        """Refuses what contradicts the layout or another fact of the conversion, once these are known.

        Raises:
            UserError: As `check`.
        """

    def check_all(self, name: str) -> None:
        """Calls the check of that name in every family, from the first on."""
        for family in reversed(type(self).__mro__):
            check: Callable[[Family], None] | None = vars(family).get(name)
            if check is not None:
                check(self)


def at_least(settings: Any, **least: int) -> None:
    """Refuses settings below their bounds."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # nan is not at least anything
            raise UserError(f"--{name} {value}: must be at least {bound}")


def inside_unit(settings: Any, *names: str) -> None:
    """Refuses settings outside (0, 1)."""
    for name in names:
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"--{name} {getattr(settings, name)}: must lie between 0 and 1")


def share(settings: Any, *names: str) -> None:
    """Refuses settings outside (0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name} {value}: must be above 0 and at most 1")


def check_steps(settings: Any, start_name: str, stop_name: str) -> None:
    """Refuses steps that are neither whole numbers nor shares below 1, and a stop before its start."""
    start, stop = getattr(settings, start_name), getattr(settings, stop_name)
    check_step(start_name, start)
    check_step(stop_name, stop)
    if stop and start >= stop and (start < 1) == (stop < 1):
        raise UserError(f"--{stop_name} {stop} is not after --{start_name} {start}")


def check_step(name: str, value: int | float | None) -> None:
    """Refuses what is neither a whole number of steps nor a share of the run."""
    if value is not None and not (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
        raise UserError(f"--{name} {value}: give a number of steps, or a share of the run below 1")


def whole_numbers(name: str, value: str | int | tuple[int, ...]) -> tuple[int, ...]:
    """Reads whole numbers with commas."""
    try:
        return tuple(int(part) for part in (value if isinstance(value, tuple) else str(value).split(",")))
    except ValueError as error:
        raise UserError(f"--{name} {value}: give whole numbers with commas") from error
