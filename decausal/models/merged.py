"""Computes products of one input together, which starts fewer kernels: queries, keys and values; gate and up.

Their weights become parts of one tensor and remain the same parameters, so this takes no memory.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from decausal.models.backbone import decoder_layers

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def merge_projections(model: nn.Module) -> int:
    """Makes each decoder layer compute its projections of one input as one product. Returns the number of such
    products.

    This is permanent, so it is for models that only decode. Only plain linear layers are merged, neither quantized ones
    nor those with adapters.
    """
    num_merged = 0
    for layer in decoder_layers(model):
        for parent in list(layer.modules()):
            for names in GROUPS:
                parts = [getattr(parent, name, None) for name in names]
                if _are_of_one_kind(parts):
                    product = _Product(parts)
                    for index, name in enumerate(names):
                        setattr(parent, name, _Part(parts[index], product, index))
                    num_merged += 1
    return num_merged


def _are_of_one_kind(parts: list[nn.Module | None]) -> TypeGuard[list[nn.Linear]]:
    if any(type(part) is not nn.Linear for part in parts):
        return False
    kinds = {(part.in_features, part.bias is None, part.weight.dtype, part.weight.device) for part in parts}
    return len(kinds) == 1


class _Product:
    """One product for several linear layers, whose parameters become parts of its own."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self._sizes = [part.out_features for part in parts]
        self._weight = _joined([part.weight for part in parts])
        self._bias = None if parts[0].bias is None else _joined([part.bias for part in parts])
        self._read: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def part(self, states: Tensor, index: int) -> Tensor:
        """Returns what one layer makes of an input. The first one to read an input computes the product for all."""
        if self._read is not states:
            parts = linear(states, self._weight, self._bias).split(self._sizes, -1)
            self._read, self._waiting = states, dict(enumerate(parts))
        found = self._waiting.pop(index)
        if not self._waiting:
            self._read = None
        return found


class _Part(nn.Module):
    """Stands for one of the linear layers of a product."""

    def __init__(self, layer: nn.Linear, product: _Product, index: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._product, self._index = product, index

    def forward(self, states: Tensor) -> Tensor:
        return self._product.part(states, self._index)


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """Returns parameters one after another, and makes them parts of this tensor."""
    joined = torch.cat([part.detach() for part in parts])
    for part, section in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = section
    return joined
