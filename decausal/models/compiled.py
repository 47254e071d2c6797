"""Decoder layers that are compiled for training only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from decausal.models.backbone import decoder_layers


def compile_layers(model: nn.Module) -> None:
    """Compiles each decoder layer. The first training step is slow, later ones are faster."""
    for layer in decoder_layers(model):
        layer.compile()


@contextmanager
def uncompiled(*models: nn.Module) -> Iterator[None]:
    """Runs compiled layers uncompiled.

    Shapes change in every pass while a model decodes or is measured. Each would be compiled until Dynamo's limit is
    reached, and all training after that would silently run uncompiled.
    """
    compiled = [
        (module, module._compiled_call_impl)
        for model in models
        for module in model.modules()
        if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None  # torch.compiler.set_stance would also stop FlexAttention's own program
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
