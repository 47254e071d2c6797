"""Cross-entropy of gathered target rows against the vocabulary, without ever holding their logits.

The gradient is computed in the forward pass, chunk by chunk: logits, softmax and gradient share one [chunk, V] buffer,
and what remains of a chunk is its [chunk, D] gradient. That takes three matrix products (logits, hidden gradient,
weight gradient), two where the head is frozen, and nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# CPU: fastest of 4 to 64 MB on one core at V = 4096 and 32000; 32 rows were a quarter slower than 64 or more.
# CUDA: not measured; small beside the activations of a training step.
_LOGITS_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
_MIN_CHUNK_SIZE = 64


class Head(NamedTuple):
    """What turns hidden states into logits: ``softcap * tanh(scale * (h @ W.T + b) / softcap)``.

    Attributes:
        weight: W.
        bias: b, if any.
        scale: factor on the logits (Granite, Cohere).
        softcap: bound on the logits (Gemma-2), None for none.
        banned: id whose logit is -inf: the mask token, which is never a prediction.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    banned: int | None = None


class TokenLoss(NamedTuple):
    """The differentiable sum that is trained on, and each row's negative log-likelihood in nats (detached)."""

    loss_sum: Float[Tensor, ""]
    nll: Float[Tensor, "n"]


def logits(hidden: Float[Tensor, "n D"], head: Head) -> Float[Tensor, "n V"]:
    """Logits in fp32 (fp64 for fp64 states). The matrix product runs in autocast's dtype, else in that of `hidden`."""
    matmul_dtype = _matmul_dtype(hidden)
    bias = None if head.bias is None else head.bias.to(matmul_dtype)
    values = torch.nn.functional.linear(hidden.to(matmul_dtype), head.weight.to(matmul_dtype), bias)
    values = values.to(_softmax_dtype(hidden)) * head.scale
    if head.softcap is not None:
        values = head.softcap * torch.tanh(values / head.softcap)
    if head.banned is not None:
        is_banned = torch.arange(values.shape[1], device=values.device) == head.banned
        values = values.masked_fill(is_banned, -torch.inf)
    return values


def chunked_cross_entropy(
    hidden: Float[Tensor, "n D"],
    head: Head,
    targets: Int[Tensor, "n"],
    weights: Float[Tensor, "n"],
    papl: float = 0.0,
    chunk_size: int | None = None,
) -> TokenLoss:
    """Sum over rows of ``(weights_i + papl * stop_gradient(p_i)) * -log p_i``, p_i being the target's probability.

    Differentiable once, in `hidden`, `head.weight` and `head.bias`. [n, V] never exists; the host never waits for the
    device. Softmax and sums are fp32 (fp64 for fp64 states), the matrix products run in autocast's dtype, else in that
    of `hidden`. A row of weight 0 is ignored, by the planner term too: its gradient is exactly 0. A logit that is not
    finite makes the loss not finite.

    Args:
        hidden: states that predict, already gathered: only rows that count.
        head: the output head; its weight's gradient is computed (in fp32) only if it requires one.
        targets: token ids in [0, V).
        weights: per-row weights, not differentiated.
        papl: weight of the planner term.
        chunk_size: rows whose logits are held at once; by default `default_chunk_size`.

    Source: planner term, PAPL (arXiv 2509.23405); here with the factor p_i detached, as REPR-ALIGN's code has it.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(head.weight.shape[0], hidden.device.type)
    wants_gradient = torch.is_grad_enabled()
    loss_sum, nll = _ChunkedCrossEntropy.apply(
        hidden, head.weight, head.bias, targets, weights, papl, chunk_size, head, wants_gradient
    )
    return TokenLoss(loss_sum, nll)


def default_chunk_size(vocabulary_size: int, device_type: str) -> int:
    """Rows per chunk: as many as keep a chunk's fp32 logits small, but enough to keep matrix products efficient."""
    logits_bytes = _LOGITS_BYTES.get(device_type, _LOGITS_BYTES["cpu"])
    return max(_MIN_CHUNK_SIZE, logits_bytes // (4 * vocabulary_size))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        papl: float,
        chunk_size: int,
        head: Head,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        matmul_dtype, softmax_dtype = _matmul_dtype(hidden), _softmax_dtype(hidden)
        needs = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients.zeros(hidden, weight, bias, needs, softmax_dtype)
        nll = hidden.new_empty(len(hidden), dtype=softmax_dtype)
        coefficients = weights.to(softmax_dtype, copy=True)
        with _autocast_off(hidden.device.type):
            cast_head = head._replace(
                weight=weight.to(matmul_dtype), bias=None if bias is None else bias.to(softmax_dtype)
            )
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                hidden_cast = hidden[rows].to(matmul_dtype)
                _chunk(rows, hidden_cast, cast_head, targets[rows], papl, nll[rows], coefficients[rows], gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll)
        return (coefficients * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else _scaled(gradient, grad_loss, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


class _Gradients(NamedTuple):
    """Gradients for grad_loss = 1, filled chunk by chunk; None where nobody wants one."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], sum_dtype: torch.dtype
    ) -> _Gradients:
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=sum_dtype) if needs[1] else None,
            torch.zeros_like(bias, dtype=sum_dtype) if needs[2] else None,
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


def _chunk(
    rows: slice,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    papl: float,
    nll: Tensor,
    coefficients: Tensor,
    gradients: _Gradients,
) -> None:
    """Fills `nll`, completes `coefficients` and adds to `gradients` for one chunk, whose buffers end with the call."""
    wants_gradient = any(gradient is not None for gradient in gradients)
    values, slope = _logits_and_slope(hidden, head, nll.dtype, wants_gradient)
    target_nll, total = _exponentiate(values, targets)
    nll.copy_(target_nll)
    coefficients.addcmul_(torch.exp(-nll), coefficients != 0, value=papl)
    if wants_gradient:
        factor = coefficients * head.scale
        gradients.add(rows, _grad_logits(values, total, targets, nll, factor, slope, hidden.dtype), hidden, head.weight)


def _logits_and_slope(
    hidden: Tensor, head: Head, dtype: torch.dtype, wants_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits of a chunk in a buffer of their own, and the derivative of the cap (None where there is none)."""
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


def _exponentiate(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits into unnormalised probabilities, in place; returns the targets' nll and each row's total."""
    values.sub_(values.amax(dim=1, keepdim=True))
    target_values = values.gather(1, targets[:, None])
    total = values.exp_().sum(dim=1, keepdim=True)
    return (total.log() - target_values).squeeze(1), total


def _grad_logits(
    exponentials: Tensor,
    total: Tensor,
    targets: Tensor,
    nll: Tensor,
    factor: Tensor,
    slope: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``factor * (p - onehot(target)) * slope`` in `dtype`, in the buffer of `exponentials` where the dtype allows it.

    On a GPU passes over this buffer cost more than the matrix products do at small D: so normalising, weighting and
    casting are one pass.
    """
    index = targets[:, None]
    at_target = (torch.expm1(-nll) * factor)[:, None]
    if slope is not None:
        exponentials.mul_(slope)
        at_target = at_target * slope.gather(1, index)
    grad_logits = exponentials if dtype == exponentials.dtype else torch.empty_like(exponentials, dtype=dtype)
    torch.mul(exponentials, factor[:, None] / total, out=grad_logits)
    return grad_logits.scatter_(1, index, at_target.to(dtype))


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # Not in place: a graph that is retained may ask again.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _autocast_off(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _softmax_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
