"""Computes a model entirely in float64, so that remaining differences are not rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from decausal.models.architecture import configured

_ROUNDED = frozenset({torch.float32, torch.bfloat16, torch.float16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
# These only need a tensor's shape or a part of it, so it is not cast for them.
_VIEWS = frozenset(
    {
        Tensor.__getitem__,
        Tensor.dim,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.numel,
        Tensor.size,
        Tensor.stride,
        Tensor.t,
        Tensor.transpose,
    }
)


@contextmanager
def in_float64(config: PretrainedConfig) -> Iterator[None]:
    """Computes in float64 everything that a model of this configuration computes inside.

    Modelling code asks for fp32 in places (norms, rotary angles, a softmax), so even a model with float64 weights
    rounds to fp32 there. Here such requests mean float64, and a weight's `dtype` reads as float64. The model keeps its
    weights. Each is cast when it is read, so there is never a second copy of all of them.

    Needs a device with float64. Gradients are not supported.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    # Grouped experts have no float64 kernel; one after another they do.
    try:
        with configured(config, _experts_implementation="eager"), _InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


class _InFloat64(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.embedding:  # reads a few rows of a matrix that may be large
            return _widened(function(*args, **kwargs))
        if function is Tensor.dtype.__get__:
            return _widened(function(*args))
        if function in _VIEWS or getattr(function, "__name__", "") == "__get__":
            return function(*args, **kwargs)
        if function in _CASTS:
            return args[0].double()
        return function(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _ROUNDED else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _ROUNDED else value
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    return value
