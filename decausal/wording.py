"""How messages put numbers into words."""

from __future__ import annotations


def quantity(number: int, noun: str, plural: str | None = None) -> str:
    """Returns a number with its noun: "1 token", "1,204 tokens", "2 forward passes".

    Args:
        number: How many.
        noun: What one of them is called.
        plural: What others are called, if not `noun` with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
