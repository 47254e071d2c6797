"""Settings as fields with their help, and the checks that several of them need.

This file is light: the command line reads settings to print its help.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from decausal.data.reading import Reading
from decausal.errors import UserError


def setting(default: Any, help_text: str) -> Any:
    """Returns a dataclass field with its help, which the command line prints."""
    return field(default=default, metadata={"help": help_text})


def reading_of(settings: Any) -> Reading:
    """Returns how records are read, from settings with the fields for it."""
    return Reading(
        text_field=settings.text_field,
        prompt_field=settings.prompt_field,
        completion_field=settings.completion_field,
        split=settings.dataset_split,
        on_bad_record=settings.on_bad_record,
    )


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
