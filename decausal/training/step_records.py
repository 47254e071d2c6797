"""Records of a run by step, one JSON object per line. A resumed run replaces those that it repeats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decausal.files import write_whole
from decausal.report.sources import read_lines


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; empty without a file. A line that a killed run has cut off is left out."""
    return read_lines(path)


def keep_records(path: Path, records: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Writes the whole file: earlier records of earlier steps, then these. Returns all of them."""
    kept = [record for record in read_records(path) if record["step"] < step] + list(records)
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
