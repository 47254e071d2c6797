"""How messages put numbers into words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import decausal
from decausal.wording import quantity

# A number in braces, and then a noun that a person may well see one of.
COUNTS = re.compile(
    r"\{(?:len\([^{}]*\)|(?:\w+\.)*(?:num_\w+|count|steps|max_steps)(?::,)?)\} "
    r"(?:answers|changes|documents|errors|evaluations|examples|forward passes|passes|prompts|runs|steps|tensors)\b"
)


@pytest.mark.parametrize(
    ("number", "plural", "expected"),
    [
        (0, None, "0 passs"),
        (1, None, "1 pass"),
        (2, "passes", "2 passes"),
        (1, "passes", "1 pass"),
        (1204, "x", "1,204 x"),
    ],
)
def test_a_number_stands_with_its_noun(number: int, plural: str | None, expected: str) -> None:
    assert quantity(number, "pass", plural) == expected


def test_no_message_counts_with_a_noun_that_is_always_a_plural() -> None:
    package = Path(decausal.__file__).parent
    found = [
        f"{path.relative_to(package)}: {match.group()}"
        for path in package.rglob("*.py")
        for match in COUNTS.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found
