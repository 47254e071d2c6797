"""Decoder layers that are compiled: for training, or for passes of one shape that are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from decausal.models.backbone import decoder_layers

PROGRAMS_PER_LAYER = 16
"""The most programs of a layer that decodes. Each layer has its own, since each has its own part of the cache."""


def compile_layers(model: nn.Module) -> None:
    """Compiles each decoder layer. The first training step is slow, later ones are faster."""
    for layer in decoder_layers(model):
        layer.compile()


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Runs decoder layers compiled inside, and as they were again after it.

    Compiling takes seconds for each layer and kind of shape, so this is for passes that are recorded and replayed.
    """
    layers, limits = decoder_layers(model), torch._dynamo.config
    most = PROGRAMS_PER_LAYER * len(layers)  # Dynamo counts the programs of all layers together, and then gives up
    limits.recompile_limit = max(limits.recompile_limit, most)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, most)
    before = [layer._compiled_call_impl for layer in layers]
    compile_layers(model)
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


@contextmanager
def uncompiled(*models: nn.Module) -> Iterator[None]:
    """Runs compiled layers uncompiled.

    Shapes change in every pass while a model decodes or is measured. Each would be compiled until Dynamo's limit is
    reached, and all training after that would silently run uncompiled.
    """
    calls = [
        (module, module._compiled_call_impl)
        for model in models
        for module in model.modules()
        if module._compiled_call_impl is not None
    ]
    for module, _ in calls:
        module._compiled_call_impl = None  # torch.compiler.set_stance would also stop FlexAttention's own program
    try:
        yield
    finally:
        for module, call in calls:
            module._compiled_call_impl = call
