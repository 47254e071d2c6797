"""Docstrings have one style, Google's, and avoid words that a native reader stumbles over."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "decausal"
MODULES = sorted(PACKAGE.rglob("*.py"))
SECTIONS = ("Args", "Attributes", "Raises")
HEADING = re.compile(r"[A-Z]\w+:")
ENTRY = re.compile(r"    (?P<names>\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): (?P<text>\S+)")
# An entry may begin with a symbol or a name in code: `n/m`, bf16, top_k.
SYMBOL = re.compile(r"[a-z]($|[./=(\d])|[\w.]*[_/=(\d]")
STUMBLES = re.compile(
    r"\b(has no say|lets? go of|to speak of|is had|unless told|anew|at hand)\b|(?<!`)\bbehind\b(?![`:])"
)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def lower_case_entries(text: str) -> list[str]:
    """Returns the entries of arguments, attributes and errors that do not begin with a capital."""
    found, section = [], ""
    for line in text.splitlines():
        if HEADING.fullmatch(line):
            section = line[:-1]
        elif line and not line.startswith(" "):
            section = ""
        elif section in SECTIONS and (entry := ENTRY.match(line)):
            word = entry["text"]
            if word[0].islower() and not SYMBOL.match(word):
                found.append(line.strip())
    return found


def test_the_check_sees_what_it_should() -> None:
    args = "Args:\n    a: the first.\n        b: deeper.\n    n: n of the block.\n    c, *d: The others."
    text = f"Adds.\n\n{args}\n\nRaises:\n    E: as g."
    assert lower_case_entries(text) == ["a: the first.", "E: as g."]
    assert STUMBLES.search("what it has no say in")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_have_one_style(path: Path) -> None:
    for line, text in docstrings(path):
        where = f"{path.relative_to(PACKAGE)}:{line}"
        assert not lower_case_entries(text), where
        assert text[0] == text[0].upper(), where
        assert not STUMBLES.search(text), where
        assert not re.search(r" {4,}(Args|Returns|Raises|Attributes): \S", text), where
