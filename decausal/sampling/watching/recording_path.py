"""Checks where a recording goes before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from decausal.errors import UserError

SUFFIXES = (".svg", ".gif")


def check_recording(path: str | Path) -> Path:
    """Returns the path of a recording, after checking that it can be written.

    Raises:
        UserError: The suffix is neither .svg nor .gif, or there is no such directory.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"a recording is an .svg or a .gif, and '{path}' is neither: give it one of these suffixes")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write the recording '{path}': there is no directory '{path.parent}'")
    return path
