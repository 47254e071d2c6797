"""Casts a model's weights to another type."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """Casts, in place, the tensors that a model's files hold. Tensors that it computes itself are left alone.

    `model.to(dtype)` also casts the frequencies of rotary positions, which transformers keeps in fp32 whatever the
    weights are. In bfloat16 an angle is off by up to a radian after a few hundred tokens.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            is_weight = name not in module._non_persistent_buffers_set
            if is_weight and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model
