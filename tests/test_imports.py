"""The import graph stays flat enough to be read."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "decausal"


SETTINGS = PACKAGE / "sampling" / "settings"


def below(path: Path) -> set[Path]:
    """Returns the files of the room that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
    names += [str(node.module) for node in nodes]
    places = [PACKAGE.parent / name.replace(".", "/") for name in names if name.startswith("decausal.sampling.")]
    found = [place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places]
    # The families of settings name the whole of them in annotations.
    upward = SETTINGS / "__init__.py" if path.is_relative_to(SETTINGS) else None
    return {file for file in found if file.exists() and file not in (path, upward)}


@cache
def floor(path: Path) -> int:
    """Returns on how many files of the room this one stands, one above the other, and one for itself."""
    return 1 + max(map(floor, below(path)), default=0)


def test_sampling_has_at_most_eleven_floors() -> None:
    floors = {path.name: floor(path) for path in (PACKAGE / "sampling").rglob("*.py")}
    assert floors["field.py"] == 1  # the lowest
    assert 5 < floors["engines.py"] < floors["model.py"] == max(floors.values()) <= 11
