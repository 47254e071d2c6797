"""Text and models that every install has: Python's own standard library, and the small AR models we trained."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_FRACTION = 0.05
_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# The manual: prose, generated into one string literal of 0.7 MB. No source code, and up to 5 % of all bytes.
_GENERATED = {"pydoc_data"}


EMBEDDED_MODELS = ("tiny", "tiny-tasks")  # trained on the standard library, and on tasks with exact answers


def embedded_model_path(name: str) -> Path:
    """Returns the directory of an embedded AR model, one of `EMBEDDED_MODELS`, in Hugging Face format."""
    return Path(__file__).parent / "embedded" / name


def tiny_model_path() -> Path:
    """Returns the directory of the AR model that was trained on the standard library."""
    return embedded_model_path("tiny")


def split_of(relative_path: str) -> Split:
    """Returns which split a file belongs to, from a hash of its path alone.

    The same file is held out on every machine and in every Python version, so a model trained on one
    interpreter's library has not seen the held-out files of another's.
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
        except UnicodeDecodeError:  # a few test files are written in other encodings on purpose
            continue
        if text.strip():
            yield relative.as_posix(), text
