"""Identity 7: the chunked divergence is the naive one, 0 where both agree, and with k = V the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decausal.errors import UserError
from decausal.objectives.head import Head, logits
from decausal.objectives.logits import KINDS, States, TopK, chunked_divergence, top_k_log_probs

N, V, D = 9, 17, 5
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 1.5},
    "banned": {"banned": 11},
    "last": {"scale": 2.5, "softcap": 3.0, "banned": V - 1},
}


def a_problem(seed: int = 0, dtype: torch.dtype = torch.float64, num_rows: int = N, teacher_rows: int = V, **options):
    """Student states and head with gradients, a teacher of another width, and row weights with zeros among them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    head = Head(randn(V, D).requires_grad_(), randn(V).requires_grad_(), **options)
    teacher = States(randn(num_rows, D + 2), Head(randn(teacher_rows, D + 2), randn(teacher_rows), softcap=4.0))
    weights = torch.rand(num_rows, generator=generator).to(dtype)
    weights[:1] = 0
    return randn(num_rows, D).requires_grad_(), head, teacher, weights


def banned_in(teacher: States, head: Head) -> Head:
    return teacher.head._replace(banned=head.banned)


def naive(hidden: Tensor, head: Head, teacher: States, kind: str, beta: float, k: int | None, tail: bool) -> Tensor:
    """The definition, event by event, in plain operations on all logits at once: [n]."""
    allowed = torch.tensor([token for token in range(V) if token != head.banned])
    log_q = logits(hidden, head)[:, allowed].log_softmax(-1)
    log_p = logits(teacher.hidden, teacher.head)[:, allowed].log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if k is not None:
        top = log_p.topk(k).indices
        is_other = torch.ones_like(p).scatter(1, top, 0)
        p_other, q_other = ((x * is_other).sum(1, keepdim=True) for x in (p, q))
        p, q = p.gather(1, top), q.gather(1, top)
        if tail and k < len(allowed):
            p, q = torch.cat([p, p_other], 1), torch.cat([q, q_other], 1)
    if kind == "forward_kl":
        return (p * (p / q).log()).sum(1)
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum(1)
    if kind == "total_variation":
        return (p - q).abs().sum(1) / 2
    mixture = beta * p + (1 - beta) * q
    return (beta * p * (p / mixture).log() + (1 - beta) * q * (q / mixture).log()).sum(1)


def ours(hidden, head, teacher, weights, kind, beta, k, tail, chunk_size=None):
    if k is not None:
        teacher = top_k_log_probs(teacher.hidden, banned_in(teacher, head), k, chunk_size)
    return chunked_divergence(hidden, head, teacher, weights, kind, beta=beta, tail_bucket=tail, chunk_size=chunk_size)


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    beta=st.floats(0.05, 0.95),
    k=st.one_of(st.none(), st.integers(1, V - 1)),
    tail=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 4, N, 50]),
    options=st.sampled_from(list(OPTIONS.values())),
)
@settings(max_examples=120, deadline=None)
def test_value_and_gradients_are_those_of_the_naive_divergence(seed, kind, beta, k, tail, chunk_size, options):
    hidden, head, teacher, weights = a_problem(seed, **options)
    inputs = (hidden, head.weight, head.bias)
    expected = naive(hidden, head, teacher, kind, beta, k, tail)
    expected_gradients = torch.autograd.grad((weights * expected).sum(), inputs)
    found = ours(hidden, head, teacher, weights, kind, beta, k, tail, chunk_size)
    torch.testing.assert_close(found.divergence, expected.detach())
    torch.testing.assert_close(found.loss_sum, (weights * expected).sum())
    for gradient, naive_gradient in zip(torch.autograd.grad(found.loss_sum, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, naive_gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["dense", "tail"])
def test_where_both_agree_value_and_gradient_are_0_exactly(options, kind, dtype, form):
    hidden, head, _, weights = a_problem(dtype=dtype, **options)
    teacher: States | TopK = States(hidden, head._replace(banned=None))
    if form == "tail":
        teacher = top_k_log_probs(hidden, head, 3)
    found = chunked_divergence(hidden, head, teacher, weights, kind, tail_bucket=True)
    gradients = torch.autograd.grad(found.loss_sum, (hidden, head.weight, head.bias))
    assert (found.divergence == 0).all()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_all_tokens_kept_the_sparse_divergence_is_the_dense_one(tail, kind, options):
    hidden, head, teacher, weights = a_problem(**options)
    dense = ours(hidden, head, teacher, weights, kind, 0.3, None, False)
    sparse = ours(hidden, head, teacher, weights, kind, 0.3, V - (head.banned is not None), tail)
    torch.testing.assert_close(sparse.divergence, dense.divergence)
    for of_sparse, of_dense in zip(
        *(torch.autograd.grad(loss.loss_sum, (hidden, head.weight, head.bias)) for loss in (sparse, dense)), strict=True
    ):
        torch.testing.assert_close(of_sparse, of_dense)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_finite_differences_of_the_value(kind, k):
    hidden, head, teacher, weights = a_problem(num_rows=3, softcap=2.0, scale=1.5, banned=4)

    def loss_sum(hidden, weight, bias):
        changed = head._replace(weight=weight, bias=bias)
        return ours(hidden, changed, teacher, weights, kind, 0.4, k, k is not None, 2).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
@pytest.mark.parametrize("k", [None, 3])
def test_the_size_of_a_chunk_changes_nothing(k, chunk_size):
    hidden, head, teacher, weights = a_problem(banned=2)
    whole = ours(hidden, head, teacher, weights, "forward_kl", 0.5, k, True)
    parts = ours(hidden, head, teacher, weights, "forward_kl", 0.5, k, True, chunk_size)
    torch.testing.assert_close(parts.divergence, whole.divergence)
    torch.testing.assert_close(
        torch.autograd.grad(parts.loss_sum, head.weight), torch.autograd.grad(whole.loss_sum, head.weight)
    )


@pytest.mark.parametrize("k", [None, 4])
def test_the_banned_token_has_no_gradient_and_the_teachers_row_for_it_does_not_matter(k):
    hidden, head, teacher, weights = a_problem(banned=11)
    found = ours(hidden, head, teacher, weights, "forward_kl", 0.5, k, False)
    found.loss_sum.backward()
    assert not head.weight.grad[11].any()
    louder = teacher.head.weight.clone()
    louder[11] *= 30
    other = States(teacher.hidden, teacher.head._replace(weight=louder))
    again = ours(hidden, head, other, weights, "forward_kl", 0.5, k, False)
    torch.testing.assert_close(again.divergence, found.divergence)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_lacks_the_mask_tokens_row_counts_like_one_that_has_it(kind):
    hidden, head, teacher, weights = a_problem(banned=V - 1)
    short = teacher.head._replace(weight=teacher.head.weight[:-1], bias=teacher.head.bias[:-1])
    whole, without = (
        chunked_divergence(hidden, head, States(teacher.hidden, of), weights, kind) for of in (teacher.head, short)
    )
    torch.testing.assert_close(without.divergence, whole.divergence)
    gradients = [torch.autograd.grad(loss.loss_sum, (hidden, head.weight, head.bias)) for loss in (whole, without)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_with_spare_rows_counts_like_one_without(kind):
    hidden, head, teacher, weights = a_problem(teacher_rows=V + 3, banned=4)
    short = teacher.head._replace(weight=teacher.head.weight[:V], bias=teacher.head.bias[:V])
    spare, without = (
        chunked_divergence(hidden, head, States(teacher.hidden, of), weights, kind) for of in (teacher.head, short)
    )
    assert torch.equal(spare.divergence, without.divergence)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_distributions_overflow_nothing(kind, k):
    hidden, head, teacher, weights = a_problem(dtype=torch.float32)
    far = (hidden.detach() * 1e3).requires_grad_()
    found = ours(far, head, teacher, weights, kind, 0.5, k, True)
    found.loss_sum.backward()
    assert found.loss_sum.isfinite()
    assert far.grad.isfinite().all()
    assert far.grad.any() or kind != "forward_kl"  # the others are flat where q is all on one token


@pytest.mark.parametrize("k", [0, V, V + 1])
def test_more_tokens_than_the_teacher_has_are_refused(k):
    _, head, teacher, _ = a_problem(banned=3)
    with pytest.raises(UserError, match=f"k = {k}: it has {V - 1} tokens"):
        top_k_log_probs(teacher.hidden, banned_in(teacher, head), k)


@pytest.mark.parametrize(("options", "message"), [({"kind": "kl"}, "divergence 'kl'"), ({"beta": 1.0}, "beta")])
def test_unknown_kinds_and_betas_are_refused(options, message):
    hidden, head, teacher, weights = a_problem()
    with pytest.raises(UserError, match=message):
        chunked_divergence(hidden, head, teacher, weights, **options)
