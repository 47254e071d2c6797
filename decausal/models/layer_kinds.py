"""The kinds of layers in a model, which differ in more than their weights: enough to examine all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from torch import nn

from decausal.models.architecture import configured
from decausal.models.backbone import decoder_layers, stock_model

_PLAIN = (bool, int, float, str, tuple, type(None))
_OF_ITS_PLACE = ("layer_idx", "training")
LEAST = 2  # so that one layer's output is another's input


def num_telling_layers(model: nn.Module) -> int:
    """Returns how many layers, from the first, include each kind. Layers of a kind share class, shapes and settings.

    Raises:
        UserError: As `decoder_layers`.
    """
    kinds = [_kind(layer) for layer in decoder_layers(model)]
    return min(len(kinds), max(LEAST, *(kinds.index(kind) + 1 for kind in kinds)))


@contextmanager
def first_layers(model: nn.Module, count: int) -> Iterator[None]:
    """Ends passes after `count` layers, in models that read the number from their configuration. Others run all
    layers."""
    config = stock_model(model).config
    layer_types = getattr(config, "layer_types", None)
    changes = {} if layer_types is None else {"layer_types": list(layer_types)[:count]}
    with configured(config, num_hidden_layers=count, **changes):
        yield


def _kind(layer: nn.Module) -> Hashable:
    return tuple((name, type(module), _settings(module), _shapes(module)) for name, module in layer.named_modules())


def _settings(module: nn.Module) -> Hashable:
    plain = {name: repr(value) for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple(sorted((name, value) for name, value in plain.items() if name not in _OF_ITS_PLACE))


def _shapes(module: nn.Module) -> Hashable:
    return tuple((name, weight.shape) for name, weight in module.named_parameters(recurse=False))
