"""The chunked divergence as a good citizen: memory, matrix products, dtypes and devices."""

from __future__ import annotations

import pytest
import torch

from decausal.objectives.head import Head
from decausal.objectives.logits import KINDS, States, chunked_divergence, top_k_log_probs
from tests.objectives.test_tokens import TensorLedger


def a_problem(n, V, D, *, trainable=True, device="cpu", dtype=torch.float32):
    hidden = torch.randn(n, D, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device, dtype=dtype) * 0.3).requires_grad_(trainable)
    teacher = States(torch.randn(n, D, device=device, dtype=dtype), Head(torch.randn(V, D, device=device, dtype=dtype)))
    return hidden, Head(weight, banned=V - 1), teacher, torch.rand(n, device=device)


def naive_sum(hidden, head, teacher, weights):
    log_q = (hidden @ head.weight.T).float().log_softmax(-1)
    log_p = (teacher.hidden @ teacher.head.weight.T).float().log_softmax(-1)
    return (weights * (log_p.exp() * (log_p - log_q)).sum(1)).sum()


def peak_bytes(loss_sum, hidden, head, teacher, weights) -> int:
    with TensorLedger(hidden, head.weight, teacher.hidden, teacher.head.weight, weights) as ledger:
        loss_sum(hidden, head, teacher, weights).backward()
    return ledger.peak_bytes


def sparse_sum(hidden, head, teacher, weights, **options):
    teacher_head = teacher.head._replace(banned=head.banned)
    top = top_k_log_probs(teacher.hidden, teacher_head, 16, options.get("chunk_size"))
    return chunked_divergence(hidden, head, top, weights, **options).loss_sum


def dense_sum(*problem, **options):
    return chunked_divergence(*problem, **options).loss_sum


@pytest.mark.parametrize("loss_sum", [dense_sum, sparse_sum])
def test_peak_memory_at_150k_vocabulary_is_a_tenth_of_the_naive_form(loss_sum):
    problem = a_problem(4096, 150_000, 64, device="meta")
    assert peak_bytes(loss_sum, *problem) <= peak_bytes(naive_sum, *problem) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_as_large_as_all_logits_is_ever_made(kind):
    n, V, D = 96, 300, 8
    problem = a_problem(n, V, D)
    for loss_sum in (dense_sum, sparse_sum):
        with TensorLedger() as ledger:
            loss_sum(*problem, kind=kind, tail_bucket=True, chunk_size=16).backward()
        assert ledger.largest == max(16 * V, V * D) < n * V


@pytest.mark.parametrize(("trainable", "products"), [(False, 2), (True, 3)])
def test_products_are_two_or_three_for_the_student_and_one_for_the_teacher(trainable, products):
    problem = a_problem(96, 300, 8, trainable=trainable)
    with TensorLedger() as ledger:
        chunked_divergence(*problem, chunk_size=32).loss_sum.backward()
    assert len(ledger.matmul_rows) == (products + 1) * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 4])
def test_the_host_never_reads_a_value(kind, k):
    hidden, head, teacher, weights = a_problem(8, 30, 4, device="meta")
    head = head._replace(bias=torch.zeros(30, device="meta"), softcap=2.0, scale=0.5)
    if k:
        teacher = top_k_log_probs(teacher.hidden, teacher.head._replace(banned=29), k, 3)
    chunked_divergence(hidden, head, teacher, weights, kind, tail_bucket=True, chunk_size=3).loss_sum.backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("form", [dense_sum, sparse_sum])
def test_no_rows_cost_nothing_and_stay_connected(form):
    problem = a_problem(0, 30, 4)
    loss = form(*problem)
    loss.backward()
    assert loss == 0
    assert problem[0].grad.shape == (0, 4)


def test_bf16_states_keep_an_fp32_softmax_and_get_bf16_gradients():
    hidden, head, teacher, weights = a_problem(64, 50, 16, dtype=torch.bfloat16)
    found = chunked_divergence(hidden, head, teacher, weights, chunk_size=10)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_teacher = States(teacher.hidden.double(), Head(teacher.head.weight.double()))
    exact = chunked_divergence(
        exact_hidden, head._replace(weight=head.weight.detach().double()), exact_teacher, weights
    )
    found.loss_sum.backward()
    exact.loss_sum.backward()
    assert found.divergence.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert found.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=5e-3)
    assert (hidden.grad - exact_hidden.grad).norm() < 0.02 * exact_hidden.grad.norm()


@pytest.mark.parametrize("k", [None, 8])
def test_under_autocast_both_heads_run_in_its_dtype(k):
    hidden, head, teacher, weights = a_problem(40, 50, 16)

    def divergence(hidden, head, teacher):
        if k:
            teacher = top_k_log_probs(teacher.hidden, teacher.head._replace(banned=head.banned), k)
        return chunked_divergence(hidden, head, teacher, weights)

    with torch.autocast("cpu", torch.bfloat16):
        autocast = divergence(hidden, head, teacher)
    autocast.loss_sum.backward()
    halves = States(teacher.hidden.bfloat16(), Head(teacher.head.weight.bfloat16()))
    explicit = divergence(hidden.bfloat16(), head._replace(weight=head.weight.bfloat16()), halves)
    assert torch.equal(autocast.divergence, explicit.divergence)
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32


def test_a_state_that_is_not_finite_makes_the_loss_not_finite():
    for kind in KINDS:
        hidden, head, teacher, weights = a_problem(9, 30, 4)
        with torch.no_grad():
            hidden[5, 2] = torch.nan
        assert not chunked_divergence(hidden, head, teacher, weights, kind).loss_sum.isfinite()
