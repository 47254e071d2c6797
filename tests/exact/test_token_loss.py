"""Identity 5: the chunked loss has the value and the gradients of the naive full-vocabulary loss."""

from __future__ import annotations

import pytest
import torch

from decausal.objectives.head import Head, logits
from decausal.objectives.tokens import chunked_cross_entropy

N, V, D = 23, 41, 6

HEADS = {
    "plain": {},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 1.5},
    "banned": {"banned": 17},
    "all": {"scale": 2.5, "softcap": 3.0, "banned": 40},
}


def _problem(dtype: torch.dtype, with_bias: bool, options: dict):
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    bias = torch.randn(V, dtype=dtype).requires_grad_() if with_bias else None
    targets = torch.randint(0, V, (N,))
    targets[targets == options.get("banned")] = 1
    weights = torch.rand(N, dtype=dtype) * 3
    weights[0] = weights[7] = 0
    return hidden, Head(weight, bias, **options), targets, weights


def _naive(hidden, head, targets, weights, papl):
    """The definition, in plain operations on all logits at once."""
    values = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        values = head.softcap * torch.tanh(values / head.softcap)
    if head.banned is not None:
        allowed = torch.tensor([token != head.banned for token in range(V)])
        values = torch.where(allowed, values, -torch.inf)
    log_probs = torch.log_softmax(values, dim=-1)
    nll = -log_probs[torch.arange(N), targets]
    row_weights = torch.where(weights == 0, 0, weights + papl * torch.exp(-nll).detach())
    return (row_weights * nll).sum(), nll


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 5, N, 10 * N, None])
@pytest.mark.parametrize("papl", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_value_and_gradients_are_those_of_the_naive_loss(dtype, chunk_size, papl, with_bias, options):
    hidden, head, targets, weights = _problem(dtype, with_bias, options)
    inputs = [hidden, head.weight] + ([head.bias] if with_bias else [])
    expected, expected_nll = _naive(hidden, head, targets, weights, papl)
    expected_gradients = torch.autograd.grad(expected, inputs)

    ours = chunked_cross_entropy(hidden, head, targets, weights, papl, chunk_size)
    gradients = torch.autograd.grad(ours.loss_sum, inputs)

    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    assert torch.allclose(ours.loss_sum, expected, **tolerance)
    assert torch.allclose(ours.nll, expected_nll, **tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert torch.allclose(gradient, expected_gradient, **tolerance)


@pytest.mark.parametrize("papl", [0.0, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_ignored_rows_get_no_gradient_and_change_nothing_wherever_they_stand(papl, chunk_size):
    hidden, head, targets, weights = _problem(torch.float32, True, {})
    is_ignored = weights == 0
    ours = chunked_cross_entropy(hidden, head, targets, weights, papl, chunk_size)
    gradient, weight_gradient = torch.autograd.grad(ours.loss_sum, (hidden, head.weight))

    counting = hidden.detach()[~is_ignored].requires_grad_()
    alone = chunked_cross_entropy(counting, head, targets[~is_ignored], weights[~is_ignored], papl, chunk_size)
    alone_gradient, alone_weight_gradient = torch.autograd.grad(alone.loss_sum, (counting, head.weight))

    assert is_ignored[0]
    assert (gradient[is_ignored] == 0).all()
    assert gradient[~is_ignored].abs().sum(dim=1).min() > 0
    assert torch.allclose(gradient[~is_ignored], alone_gradient, atol=1e-6)
    assert torch.allclose(weight_gradient, alone_weight_gradient, atol=1e-5)
    assert torch.allclose(ours.loss_sum, alone.loss_sum)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradients_are_the_finite_differences_of_the_value(options):
    hidden, head, targets, weights = _problem(torch.float64, True, options)

    def loss_sum(hidden, weight, bias):
        return chunked_cross_entropy(hidden, head._replace(weight=weight, bias=bias), targets, weights, 0.0, 9).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_the_loss_reads_the_same_logits_that_sampling_reads(options):
    hidden, head, targets, weights = _problem(torch.float32, True, options)
    nll = torch.nn.functional.cross_entropy(logits(hidden, head), targets, reduction="none")
    assert torch.allclose(chunked_cross_entropy(hidden, head, targets, weights).nll, nll, atol=1e-5)


@pytest.mark.parametrize("banned", [3, 40])
def test_the_banned_token_has_no_gradient_at_all(banned):
    hidden, head, targets, weights = _problem(torch.float32, True, {"banned": banned})
    chunked_cross_entropy(hidden, head, targets, weights, 1.0).loss_sum.backward()
    assert (head.weight.grad[banned] == 0).all()
    assert head.bias.grad[banned] == 0


def test_large_logits_overflow_nothing():
    hidden, head, targets, weights = _problem(torch.float32, False, {})
    large = (hidden.detach() * 1e4).requires_grad_()
    ours = chunked_cross_entropy(large, head, targets, weights, 1.0)
    expected, _ = _naive(large, head, targets, weights, 1.0)
    ours.loss_sum.backward()
    assert torch.allclose(ours.loss_sum, expected, rtol=1e-6)
    assert large.grad.isfinite().all()
