"""The output head as tensors, and what losses share that read it chunk by chunk.

A loss gathers the rows that count and works in chunks. It computes a chunk's logits in one buffer, turns the buffer
into the gradient, and keeps only that [chunk, D] gradient: [n, V] never exists.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from decausal.devices import autocast_dtype, choices

_MIN_CHUNK_SIZE = 64


class Head(NamedTuple):
    """What turns hidden states into logits: ``softcap * tanh(scale * (h @ W.T + b) / softcap)``.

    Attributes:
        weight: W.
        bias: The bias b, if any.
        scale: Factor on the logits (Granite, Cohere).
        softcap: Bound on the logits (Gemma-2), or None.
        banned: Id whose logit is -inf: the mask token, which is never a prediction.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    banned: int | None = None


def logits(hidden: Float[Tensor, "n D"], head: Head) -> Float[Tensor, "n V"]:
    """Returns logits in fp32 (fp64 for fp64 states), from a matrix product in autocast's dtype or that of `hidden`."""
    matmul_dtype = matmul_dtype_of(hidden)
    bias = None if head.bias is None else head.bias.to(matmul_dtype)
    values = torch.nn.functional.linear(hidden.to(matmul_dtype), head.weight.to(matmul_dtype), bias)
    values = values.to(softmax_dtype_of(hidden))
    if head.scale != 1.0:
        values = values * head.scale
    if head.softcap is not None:
        values = head.softcap * torch.tanh(values / head.softcap)
    if head.banned is not None:
        is_banned = torch.arange(values.shape[1], device=values.device) == head.banned
        values.masked_fill_(is_banned, -torch.inf)  # in place: nothing else holds these values
    return values


def default_chunk_size(vocabulary_size: int, device_type: str) -> int:
    """Returns rows per chunk: few enough for small fp32 logits, and enough for efficient matrix products."""
    return max(_MIN_CHUNK_SIZE, choices(device_type).logits_bytes // (4 * vocabulary_size))


class Gradients(NamedTuple):
    """Gradients for grad_loss = 1, filled chunk by chunk; None where none is needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], sum_dtype: torch.dtype
    ) -> Gradients:
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=sum_dtype) if needs[1] else None,
            torch.zeros_like(bias, dtype=sum_dtype) if bias is not None and needs[2] else None,
        )

    def add(self, rows: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=0, dtype=self.bias.dtype))
        if self.hidden is not None:
            self.hidden[rows] = grad_logits @ weight
        if self.weight is not None and self.weight.dtype == grad_logits.dtype:
            self.weight.addmm_(grad_logits.T, hidden)
        elif self.weight is not None:
            self.weight.add_(grad_logits.T @ hidden)

    def keep(self, ctx: Any, *dtypes: torch.dtype | None) -> None:
        """Keeps them for the backward pass, with the types of their tensors."""
        ctx.save_for_backward(*self)
        ctx.dtypes = dtypes

    @staticmethod
    def kept(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
        """Returns the kept ones for this `grad_loss`."""
        return [
            None if gradient is None else scaled_gradient(gradient, grad_loss, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]


def logits_and_slope(hidden: Tensor, head: Head, dtype: torch.dtype, wants_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Returns a chunk's logits in a new buffer, and the derivative of the cap (None without a cap)."""
    values = (hidden @ head.weight.T).to(dtype)
    slope = None
    if head.bias is not None:
        values.add_(head.bias)
    if head.scale != 1.0:
        values.mul_(head.scale)
    if head.softcap is not None:
        values.div_(head.softcap).tanh_()
        slope = values.square().neg_().add_(1) if wants_slope else None
        values.mul_(head.softcap)
    if head.banned is not None:
        values[:, head.banned].fill_(-torch.inf)
    return values, slope


def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # Not in place: a retained graph may need them again.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def matmul_dtype_of(hidden: Tensor) -> torch.dtype:
    return autocast_dtype(hidden.device.type) or hidden.dtype


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def softmax_dtype_of(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
