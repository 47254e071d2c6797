"""Compiles decoder layers, for training or for recorded passes of one shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from decausal.errors import first_line
from decausal.models.backbone import decoder_layers, stock_model
from decausal.models.row_attention import FLEX

logger = logging.getLogger(__name__)

PROGRAMS_PER_LAYER = 16
"""The most programs of one layer, which differ in gradient, mask and shape, for the student and its teacher."""


def compile_layers(*models: nn.Module) -> None:
    """Compiles each decoder layer. The first training step is slow, later ones are faster.

    Hooks of a layer run uncompiled, outside of it, because a teacher's hooks, which gather its states, are new in each
    pass.
    """
    _allow(PROGRAMS_PER_LAYER)
    for model in models:
        for layer in decoder_layers(model):
            layer._compiled_call_impl = _hooks_apart(layer)


def _hooks_apart(layer: nn.Module) -> Callable[..., Any]:
    """Returns a function that calls a layer with its hooks, in which only the forward pass is compiled."""
    forward = torch.compile(layer.forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        layer.forward = forward  # only for this call: a copy of the model must not run this layer's weights
        try:
            return layer._call_impl(*args, **kwargs)
        finally:
            del layer.forward

    return call


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Inside, decoder layers run compiled. Afterwards they run as before.

    Compiling takes seconds for each layer and kind of shape, so this is for passes that are recorded and replayed.
    """
    layers = decoder_layers(model)
    _allow(PROGRAMS_PER_LAYER * len(layers))  # each layer has its own, since each has its own part of the cache
    before = [layer._compiled_call_impl for layer in layers]
    compile_layers(model)
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


def _allow(num_programs: int) -> None:
    """Lets Dynamo make this many programs of one piece of code. Beyond that it would give up, and run slowly and
    silently."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, num_programs)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, num_programs)


@contextmanager
def by_lengths(model: nn.Module) -> Iterator[None]:
    """Inside, attention reads only as much of each row as it holds, by FlexAttention: see `visible_by_layer`."""
    config = stock_model(model).base_model.config
    before, config._attn_implementation = config._attn_implementation, FLEX
    try:
        yield
    finally:
        config._attn_implementation = before


class CompiledPasses:
    """Runs passes with compiled layers. If a model cannot be compiled, they run uncompiled, and a line is logged once.

    Args:
        model: The model.
        has_lengths: Whether passes may attend `by_lengths`.
    """

    def __init__(self, model: nn.Module, *, has_lengths: bool) -> None:
        self._model, stock = model, stock_model(model)
        takes_lengths = stock._supports_flex_attn and stock.base_model.config._attn_implementation == "sdpa"
        self._ways = {"compiled": [compiled]}
        if has_lengths and takes_lengths:
            self._ways = {"compiled with FlexAttention": [compiled, by_lengths], **self._ways}

    def run(self, one_pass: Callable[[], Any]) -> Any:
        """Returns the result of a pass, which may have to be started several times."""
        for name, contexts in list(self._ways.items()):
            try:
                with ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context(self._model))
                    return one_pass()
            except Exception as error:  # models fail in many ways: shapes, attributes, the compiler
                logger.warning("decoder layers cannot be %s: %s", name, first_line(error))
                del self._ways[name]
        return one_pass()


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
