"""The small AR models inside the package: trained on Python's standard library, and on tasks with exact answers."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODELS = ("tiny", "tiny-tasks")


def embedded_model_path(name: str) -> Path:
    """Returns the directory of an embedded AR model, one of `EMBEDDED_MODELS`, in Hugging Face format."""
    return Path(__file__).parent / name


def tiny_model_path() -> Path:
    """Returns the directory of the AR model that was trained on the standard library."""
    return embedded_model_path("tiny")
