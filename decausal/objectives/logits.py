"""Distillation: how far the student's next-token distribution is from the teacher's. Neither is held for all rows.

As in `decausal.objectives.tokens`, the gradient is computed in the forward pass, chunk by chunk. The teacher is given
by its states and head, or by its top k log-probabilities. From states, logits are made for one chunk and dropped.

The student never predicts the banned token (its mask token), so the teacher's distribution is renormalised without it.
Both are then distributions over the same tokens, and they can agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from decausal.errors import UserError, nearest
from decausal.objectives.head import (
    Gradients,
    Head,
    autocast_off,
    default_chunk_size,
    logits_and_slope,
    matmul_dtype_of,
    softmax_dtype_of,
)

KINDS = ("forward_kl", "reverse_kl", "jsd", "total_variation")

# Stands for log 0: finite, so that 0 * (log 0 - log 0) is 0 and not nan.
_LOG_ZERO = -1e30


class TopK(NamedTuple):
    """The teacher's k most probable tokens per row, not renormalised.

    Attributes:
        log_probs: Their log-probabilities in descending order, in the vocabulary without the banned token.
        ids: Their token ids.
        log_tail: Log of the probability of all other tokens together (about -1e30 if there are none).
    """

    log_probs: Float[Tensor, "n k"]
    ids: Int[Tensor, "n k"]
    log_tail: Float[Tensor, " n"]


class States(NamedTuple):
    """A teacher over the full vocabulary: the states that predict, and the head that reads them."""

    hidden: Float[Tensor, "n Dt"]
    head: Head


class LogitLoss(NamedTuple):
    """The differentiable weighted sum that is trained on, and each row's divergence in nats (detached)."""

    loss_sum: Float[Tensor, ""]
    divergence: Float[Tensor, " n"]


def top_k_log_probs(hidden: Float[Tensor, "n D"], head: Head, k: int, chunk_size: int | None = None) -> TopK:
    """Returns the k most probable tokens of each row, without gradient. [n, V] never exists.

    Args:
        hidden: The teacher's states that predict.
        head: Its head; `banned` names the token that the student cannot predict.
        k: Tokens to keep, at most as many as there are.
        chunk_size: Rows whose logits are held at once.

    Raises:
        UserError: `k` is below 1 or above the number of tokens.
    """
    num_tokens = head.weight.shape[0] - (head.banned is not None)
    if not 1 <= k <= num_tokens:
        raise UserError(f"top-k of the teacher with k = {k}: it has {num_tokens} tokens to choose from; give 1 to that")
    size = chunk_size or default_chunk_size(head.weight.shape[0], hidden.device.type)
    with torch.no_grad():
        chunks = [_top_k_of_logits(values, k) for _, values in _logit_chunks(hidden, head, size)]
        if not chunks:
            empty = hidden.new_empty(0, k, dtype=softmax_dtype_of(hidden))
            return TopK(empty, empty.long(), empty[:, 0])
        return TopK(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def chunked_divergence(
    hidden: Float[Tensor, "n D"],
    head: Head,
    teacher: TopK | States,
    weights: Float[Tensor, " n"],
    kind: str = "forward_kl",
    *,
    beta: float = 0.5,
    tail_bucket: bool = False,
    chunk_size: int | None = None,
) -> LogitLoss:
    """Returns the weighted sum over rows of the divergence between the teacher's p and the student's q.

    ``forward_kl``: sum p (log p - log q). ``reverse_kl``: sum q (log q - log p). ``jsd``, with the mixture
    m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m). ``total_variation``: sum |p - q| / 2, between 0
    and 1; a token drafted from q is accepted by p with probability 1 minus that.

    With a teacher of `States`, sums run over the full vocabulary. With a `TopK` they run over its tokens, which are not
    renormalised. The forward KL is then smallest where q is proportional to p on them; the other kinds can fall below 0
    and need the tail. With `tail_bucket` all other tokens count as one event, and every kind is a true divergence over
    k + 1 events.

    Differentiable once, in `hidden`, `head.weight` and `head.bias`. [n, V] never exists; the host never waits for the
    device. Where both agree, value and gradient are 0. Softmax and sums are fp32 (fp64 for fp64 states).

    Args:
        hidden: The student's states that predict, already gathered.
        head: Its head, with the mask token banned; a frozen weight gets no gradient computed.
        teacher: The teacher's rows, in the same order. With `States`, only tokens in both vocabularies count.
        weights: Per-row weights, not differentiated.
        kind: Which divergence.
        beta: The mixture's weight of p for ``jsd``, between 0 and 1.
        tail_bucket: Whether all other tokens count as one event, with a `TopK`.
        chunk_size: Rows whose logits are held at once.

    Raises:
        UserError: An unknown kind, or a beta that is not between 0 and 1.

    Source: forward KL on the student's own states, OPDLM (arXiv 2606.06712); generalised JSD, GKD (arXiv 2306.13649),
    equation 1; acceptance, speculative decoding (arXiv 2211.17192), corollary 3.6.
    """
    if kind not in KINDS:
        raise UserError(f"divergence '{kind}' is not known{nearest(kind, KINDS)}; accepted: {', '.join(KINDS)}")
    if not 0 < beta < 1:
        raise UserError(f"beta of the JSD is {beta}; it must lie between 0 and 1 (at either end it is one of the KLs)")
    if chunk_size is None:
        chunk_size = default_chunk_size(head.weight.shape[0], hidden.device.type)
    plan = _Plan(head, teacher, _Divergence(kind, beta), tail_bucket, chunk_size, torch.is_grad_enabled())
    loss_sum, divergence = _ChunkedDivergence.apply(hidden, head.weight, head.bias, weights, plan)
    return LogitLoss(loss_sum, divergence)


class _Divergence(NamedTuple):
    """A divergence as a sum of f(p, q) over events."""

    kind: str
    beta: float

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor, is_whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the sum of f [c], q * df/dq [c e], and the sum of the latter [c 1].

        If the events are complete (`is_whole`), a constant in df/dq does not change the gradient with respect to the
        logits. It is left out, so that equal distributions give a gradient of exactly 0. `log_p` may be overwritten.
        """
        if self.kind == "forward_kl":
            p = log_p.exp()
            value = log_p.sub_(log_q).mul_(p).sum(dim=1)
            slope = p.neg_()
            total = slope.new_full((len(slope), 1), -1.0) if is_whole else slope.sum(dim=1, keepdim=True)
            return value, slope, total
        if self.kind == "reverse_kl":
            slope = torch.sub(log_q, log_p, out=log_p).mul_(q)
            value = slope.sum(dim=1)
            slope = slope if is_whole else slope.add_(q)
            return value, slope, slope.sum(dim=1, keepdim=True)
        if self.kind == "total_variation":
            difference = torch.sub(q, log_p.exp_(), out=log_p)
            value = difference.abs().sum(dim=1) / 2
            slope = difference.sign_().mul_(q).div_(2)
            return value, slope, slope.sum(dim=1, keepdim=True)
        log_p_over_m, log_q_over_m = self._over_mixture(log_p, log_q)
        slope = log_q_over_m.mul_(q).mul_(1 - self.beta)
        total = slope.sum(dim=1, keepdim=True)
        value = log_p_over_m.mul_(log_p.exp_()).sum(dim=1) * self.beta + total[:, 0]
        return value, slope, total

    def _over_mixture(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log(p / m) and log(q / m) from log(q / p), without overflow, and exactly 0 where p = q."""
        difference = log_q - log_p
        is_above = difference > 0
        weight = torch.full_like(difference, 1 - self.beta).masked_fill_(is_above, self.beta)
        apart = difference.abs()
        smaller = torch.expm1(-apart).mul_(weight).log1p_()  # log of m over the larger of p and q
        log_m_over_p = torch.where(is_above, smaller + apart, smaller)
        log_m_over_q = torch.where(is_above, smaller, smaller + apart)
        return log_m_over_p.neg_(), log_m_over_q.neg_()


class _Plan(NamedTuple):
    """Everything that is the same for all chunks of one call."""

    head: Head
    teacher: TopK | States
    divergence: _Divergence
    tail_bucket: bool
    chunk_size: int
    wants_gradient: bool


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        softmax_dtype = softmax_dtype_of(hidden)
        needs = [plan.wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        gradients = Gradients.zeros(hidden, weight, bias, needs, softmax_dtype)
        divergence = hidden.new_empty(len(hidden), dtype=softmax_dtype)
        coefficients = weights.to(softmax_dtype)
        matmul_dtype = matmul_dtype_of(hidden)
        head = plan.head._replace(weight=weight.to(matmul_dtype), bias=None if bias is None else bias.to(softmax_dtype))
        for rows, teacher in _teacher_chunks(plan, softmax_dtype):
            hidden_cast = hidden[rows].to(matmul_dtype)
            with autocast_off(hidden.device.type):
                _chunk(rows, hidden_cast, head, teacher, plan, divergence[rows], coefficients[rows], gradients)
        gradients.keep(ctx, hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(divergence)
        return (coefficients * divergence).sum(), divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_divergence: Tensor) -> tuple[Tensor | None, ...]:
        return (*Gradients.kept(ctx, grad_loss), None, None)


def _chunk(
    rows: slice,
    hidden: Tensor,
    head: Head,
    teacher: TopK | Tensor,
    plan: _Plan,
    divergence: Tensor,
    coefficients: Tensor,
    gradients: Gradients,
) -> None:
    """Fills `divergence` and adds to `gradients` for one chunk, whose buffers end with the call."""
    wants_gradient = any(gradient is not None for gradient in gradients)
    values, slope = logits_and_slope(hidden, head, divergence.dtype, wants_gradient)
    if isinstance(teacher, TopK):
        value, grad_logits = _sparse(values, teacher, plan.divergence, plan.tail_bucket)
    else:
        value, grad_logits = _dense(values, teacher, plan.divergence, head.banned)
    divergence.copy_(value)
    if not wants_gradient:
        return
    grad_logits.mul_((coefficients * head.scale)[:, None])
    if slope is not None:
        grad_logits.mul_(slope)
    gradients.add(rows, grad_logits.to(hidden.dtype), hidden, head.weight)


def _dense(
    values: Tensor, teacher_values: Tensor, divergence: _Divergence, banned: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the divergence over all tokens [c] and its gradient in the student's logits [c V]; overwrites its
    arguments."""
    num_shared = teacher_values.shape[1]
    values[:, num_shared:].fill_(-torch.inf)
    log_q = values.sub_(torch.logsumexp(values, dim=1, keepdim=True))
    shared, log_p = log_q[:, :num_shared], teacher_values
    log_p.sub_(torch.logsumexp(log_p, dim=1, keepdim=True))
    if banned is not None and banned < num_shared:
        log_p[:, banned].fill_(_LOG_ZERO)
        shared[:, banned].fill_(_LOG_ZERO)
    q = shared.exp()
    value, slope, total = divergence.terms(log_p, shared, q, is_whole=True)
    log_q[:, num_shared:].fill_(0)
    torch.addcmul(slope, q, total, value=-1, out=shared)
    return value, log_q


def _sparse(values: Tensor, teacher: TopK, divergence: _Divergence, tail_bucket: bool) -> tuple[Tensor, Tensor]:
    """Does what `_dense` does over the teacher's k tokens, and the tail if it counts; overwrites `values`."""
    normaliser = torch.logsumexp(values, dim=1, keepdim=True)
    log_q = values.gather(1, teacher.ids) - normaliser
    log_p = teacher.log_probs.to(values.dtype, copy=True)
    others = normaliser  # what the probabilities of the other tokens are relative to
    if tail_bucket:
        values.scatter_(1, teacher.ids, -torch.inf)
        others = torch.logsumexp(values, dim=1, keepdim=True).clamp(min=_LOG_ZERO)
        log_q = torch.cat([log_q, (others - normaliser).clamp(min=_LOG_ZERO)], dim=1)
        log_p = torch.cat([log_p, teacher.log_tail[:, None].to(values.dtype)], dim=1)
    q = log_q.exp()
    value, slope, total = divergence.terms(log_p, log_q, q, is_whole=tail_bucket)
    of_events = torch.addcmul(slope, q, total, value=-1)
    k = teacher.ids.shape[1]
    grad_logits = values.sub_(others).exp_().mul_(of_events[:, k:] if tail_bucket else -total)
    return value, grad_logits.scatter_(1, teacher.ids, of_events[:, :k])


def _teacher_chunks(plan: _Plan, dtype: torch.dtype) -> Iterator[tuple[slice, TopK | Tensor]]:
    if isinstance(plan.teacher, TopK):
        for start in range(0, len(plan.teacher.ids), plan.chunk_size):
            rows = slice(start, start + plan.chunk_size)
            yield rows, TopK(*(part[rows] for part in plan.teacher))
        return
    hidden, head = plan.teacher
    num_shared = min(len(head.weight), len(plan.head.weight))
    banned = plan.head.banned
    head = head._replace(
        weight=head.weight[:num_shared].detach(),
        bias=None if head.bias is None else head.bias[:num_shared].detach(),
        banned=banned if banned is not None and banned < num_shared else None,
    )
    for rows, values in _logit_chunks(hidden.detach(), head, plan.chunk_size):
        yield rows, values.to(dtype)


def _logit_chunks(hidden: Tensor, head: Head, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of rows and their logits. The caller may overwrite each buffer."""
    matmul_dtype, softmax_dtype = matmul_dtype_of(hidden), softmax_dtype_of(hidden)
    cast_head = head._replace(
        weight=head.weight.to(matmul_dtype), bias=None if head.bias is None else head.bias.to(softmax_dtype)
    )
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        with autocast_off(hidden.device.type):
            values, _ = logits_and_slope(hidden[rows].to(matmul_dtype), cast_head, softmax_dtype, False)
        yield rows, values


def _top_k_of_logits(values: Tensor, k: int) -> TopK:
    """Overwrites `values`."""
    normaliser = torch.logsumexp(values, dim=1, keepdim=True)
    top, ids = values.topk(k, dim=1)
    values.scatter_(1, ids, -torch.inf)
    log_tail = (torch.logsumexp(values, dim=1, keepdim=True) - normaliser).clamp(min=_LOG_ZERO)
    return TopK(top - normaliser, ids, log_tail[:, 0])
