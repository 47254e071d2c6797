"""Shapes in signatures are checked while tests run; everything is seeded; no test reaches a network."""

# ruff: noqa: E402 - what is imported first decides what is checked and where caches go

import gc
import os
import tempfile
import threading

_HOME = tempfile.TemporaryDirectory(prefix="decausal-tests-")  # nothing is cached in the user's home
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of as many workers as cores would wait for each other

from tests import hangs, shape_checks

shape_checks.install()

from collections.abc import Iterator

import pytest
import torch
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # tqdm's own is shared with copies of this process: one killed with it would stop all


def pytest_configure() -> None:
    hangs.end_copies()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gradients_as_before() -> Iterator[None]:
    """A generator that stops inside `torch.no_grad` would switch gradients off for every later test."""
    yield
    assert torch.is_grad_enabled(), "the test leaves gradients switched off"


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    """Training arguments set variables by which transformers tells accelerate of FSDP, even where it is refused."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def pytest_collection_finish() -> None:
    """Keeps what the imports made out of later collections: each training run asks for one, at 0.3 s with them."""
    gc.collect()
    gc.freeze()
