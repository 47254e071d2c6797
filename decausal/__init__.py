"""Turn an autoregressive language model into a diffusion language model.

The public names are resolved on first use, so that importing decausal imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "BatchEngine": "decausal.sampling.batch",
    "ConversionSettings": "decausal.training.settings",
    "DiffusionModel": "decausal.sampling.model",
    "UserError": "decausal.errors",
    "convert": "decausal.training.convert",
    "load": "decausal.sampling.model",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'decausal' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
