"""Shapes in signatures are checked while tests run; everything is seeded; no test reaches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("decausal", "beartype.beartype")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
