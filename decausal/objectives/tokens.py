"""Cross-entropy of gathered target rows against the vocabulary, without holding their logits.

The gradient is computed in the forward pass, chunk by chunk. Logits, softmax and gradient share one [chunk, V] buffer,
and only the [chunk, D] gradient remains. That takes three matrix products: logits, hidden gradient, weight gradient
(two with a frozen head). Nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from decausal.objectives.head import (
    Gradients,
    Head,
    autocast_off,
    default_chunk_size,
    logits_and_slope,
    matmul_dtype_of,
    softmax_dtype_of,
)


class TokenLoss(NamedTuple):
    """The differentiable sum that is trained on, and each row's negative log-likelihood in nats (detached)."""

    loss_sum: Float[Tensor, ""]
    nll: Float[Tensor, " n"]


def chunked_cross_entropy(
    hidden: Float[Tensor, "n D"],
    head: Head,
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    papl: float = 0.0,
    chunk_size: int | None = None,
) -> TokenLoss:
    """Returns the sum over rows of ``(weights_i + papl * stop_gradient(p_i)) * -log p_i``, p_i being the target's
    probability.

    Differentiable once, in `hidden`, `head.weight` and `head.bias`. [n, V] never exists; the host never waits for the
    device. Softmax and sums are fp32 (fp64 for fp64 states), the matrix products run in autocast's dtype, else in that
    of `hidden`. A row of weight 0 is ignored, by the planner term too: its gradient is exactly 0. A logit that is not
    finite makes the loss not finite.

    Args:
        hidden: States that predict, already gathered: only rows that count.
        head: The output head; its weight's gradient is computed (in fp32) only if it requires one.
        targets: Token ids in [0, V).
        weights: Per-row weights, not differentiated.
        papl: Weight of the planner term.
        chunk_size: Rows whose logits are held at once; by default `default_chunk_size`.

    Source: planner term, PAPL (arXiv 2509.23405), with the factor p_i detached as in REPR-ALIGN's code.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(head.weight.shape[0], hidden.device.type)
    wants_gradient = torch.is_grad_enabled()
    loss_sum, nll = _ChunkedCrossEntropy.apply(
        hidden, head.weight, head.bias, targets, weights, papl, chunk_size, head, wants_gradient
    )
    return TokenLoss(loss_sum, nll)


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
        matmul_dtype, softmax_dtype = matmul_dtype_of(hidden), softmax_dtype_of(hidden)
        needs = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        gradients = Gradients.zeros(hidden, weight, bias, needs, softmax_dtype)
        nll = hidden.new_empty(len(hidden), dtype=softmax_dtype)
        coefficients = weights.to(softmax_dtype, copy=True)
        with autocast_off(hidden.device.type):
            cast_head = head._replace(
                weight=weight.to(matmul_dtype), bias=None if bias is None else bias.to(softmax_dtype)
            )
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                hidden_cast = hidden[rows].to(matmul_dtype)
                _chunk(rows, hidden_cast, cast_head, targets[rows], papl, nll[rows], coefficients[rows], gradients)
        gradients.keep(ctx, hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll)
        return (coefficients * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        return (*Gradients.kept(ctx, grad_loss), None, None, None, None, None, None)


def _chunk(
    rows: slice,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    papl: float,
    nll: Tensor,
    coefficients: Tensor,
    gradients: Gradients,
) -> None:
    """Fills `nll`, completes `coefficients` and adds to `gradients` for one chunk, whose buffers end with the call."""
    wants_gradient = any(gradient is not None for gradient in gradients)
    values, slope = logits_and_slope(hidden, head, nll.dtype, wants_gradient)
    target_nll, total = _exponentiate(values, targets)
    nll.copy_(target_nll)
    coefficients.addcmul_(torch.exp(-nll), coefficients != 0, value=papl)
    if wants_gradient:
        factor = coefficients * head.scale
        gradients.add(rows, _grad_logits(values, total, targets, nll, factor, slope, hidden.dtype), hidden, head.weight)


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
    """Returns ``factor * (p - onehot(target)) * slope`` in `dtype`, reusing the buffer of `exponentials`.

    On a GPU, passes over this buffer cost more than the matrix products at small D. So normalising, weighting and
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
