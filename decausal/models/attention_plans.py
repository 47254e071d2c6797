"""Limits cuDNN's attention plans. Each exact shape needs one, which takes about a second: good for few shapes only.

Others have measured 0.44 s forward and 0.55 s backward per shape on a B200. The other kernels need no plans.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MOST_PLANS = 4
"""How many shapes of one model get a plan, in training or not."""
SHORTEST = 128
"""Length of a row in tokens from which a plan may be worth its time."""
_SHAPES: weakref.WeakKeyDictionary[nn.Module, dict[bool, set[Any]]] = weakref.WeakKeyDictionary()


@contextmanager
def without_plans() -> Iterator[None]:
    """Runs attention without cuDNN, for decoding, whose shapes change with every pass."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def few_plans(body: nn.Module, shape: tuple[int, int]) -> Iterator[None]:
    """Lets cuDNN compute the attention of a pass over rows [B T] for the first few shapes only.

    A model whose training rows vary more runs without cuDNN from then on, in the whole process, because gradient
    checkpointing computes attention again in the backward pass.
    """
    known = _SHAPES.setdefault(body, {True: set(), False: set()})[body.training]
    if shape in known or (len(known) < MOST_PLANS and shape[1] >= SHORTEST):
        known.add(shape)
        yield
    elif body.training:
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    else:
        with without_plans():
            yield
