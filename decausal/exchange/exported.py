"""What an export made."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from decausal.models.facts import ConversionFacts


class Exported(NamedTuple):
    """What an export made.

    Attributes:
        output_dir: the directory.
        facts: the facts of the model in it.
        commands: how to serve it, by the engine's name.
        notes: what its user should know.
    """

    output_dir: Path
    facts: ConversionFacts
    commands: dict[str, str]
    notes: list[str]
