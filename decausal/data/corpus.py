"""Text that every install has: the source code of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_FRACTION = 0.05
_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# The manual: prose in one generated string literal of 0.7 MB, up to 5 % of all bytes. It is not source code.
_GENERATED = {"pydoc_data"}


def split_of(relative_path: str) -> Split:
    """Returns which split a file belongs to, from a hash of its path.

    The same file is held out on every machine and in every Python version. So a model trained on one interpreter's
    library has not seen the held-out files of another.
    """
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_FRACTION else "train"


def stdlib_documents(split: Split) -> Iterator[tuple[str, str]]:
    """Yields (path relative to the library, source text) for each file of the split, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if (_NOT_STANDARD_LIBRARY | _GENERATED).intersection(relative.parts) or split_of(relative.as_posix()) != split:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files use other encodings on purpose
            continue
        if text.strip():
            yield relative.as_posix(), text
