"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PARTIAL = re.compile(r".+\.tmp\d+")


def is_partial(path: Path) -> bool:
    """Whether a killed `write_whole` has left this file."""
    return _PARTIAL.fullmatch(path.name) is not None


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: a reader finds the old file, the new one or none, never a part of one.

    Raises:
        OSError: as `open`; then the old file is still there and nothing else is.
    """
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
