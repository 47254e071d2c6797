"""The alignment term's manners: what it keeps, what it touches, what it refuses."""

from __future__ import annotations

import pytest
import torch

from decausal.errors import UserError
from decausal.objectives.hidden import alignment, alignment_at

N, D = 12, 16
INDEX = torch.tensor([0, 3, 4, 11])


def test_no_fp32_copy_is_kept_for_the_backward_pass():
    student = torch.randn(N, D, dtype=torch.bfloat16).requires_grad_()
    teacher_rows = torch.randn(len(INDEX), D, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        alignment_at(student, INDEX, teacher_rows, "cosine")
    given = {tensor.data_ptr() for tensor in (student, INDEX, teacher_rows)}
    made = [tensor for tensor in kept if tensor.data_ptr() not in given]
    assert sum(tensor.numel() for tensor in made) == 3 * len(INDEX)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_the_gradient_lands_on_aligned_rows_only_in_the_students_shape_and_dtype(distance):
    student = torch.randn(2, N // 2, D, dtype=torch.bfloat16).requires_grad_()
    alignment_at(student, INDEX, torch.randn(len(INDEX), D), distance).backward()
    is_touched = student.grad.flatten(0, 1).abs().sum(dim=-1) > 0
    assert student.grad.dtype == torch.bfloat16
    assert is_touched.nonzero().squeeze(1).tolist() == INDEX.tolist()


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_a_row_aligned_twice_gets_both_gradients(distance):
    student, teacher_rows = torch.randn(N, D).requires_grad_(), torch.randn(2, D)
    twice = alignment_at(student, torch.tensor([5, 5]), teacher_rows, distance)
    (gradient,) = torch.autograd.grad(twice, student)
    apart = [alignment_at(student, torch.tensor([5]), row[None], distance) for row in teacher_rows]
    (expected,) = torch.autograd.grad(sum(apart), student)
    assert torch.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_indexed_and_gathered_forms_agree_also_on_transposed_states(distance):
    student = torch.randn(D, N).T.requires_grad_()
    teacher_rows = torch.randn(len(INDEX), D)
    indexed, gathered = (
        alignment_at(student, INDEX, teacher_rows, distance),
        alignment(student[INDEX], teacher_rows, distance),
    )
    assert torch.equal(indexed, gathered)
    assert torch.equal(*torch.autograd.grad(indexed, student), *torch.autograd.grad(gathered, student))


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_bf16_states_are_summed_in_fp32(distance):
    student, teacher = torch.randn(5000, D).bfloat16(), torch.randn(5000, D).bfloat16()
    ours, exact = alignment(student, teacher, distance), alignment(student.double(), teacher.double(), distance)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_the_teacher_gets_no_gradient(distance):
    student, teacher = torch.randn(4, D).requires_grad_(), torch.randn(4, D).requires_grad_()
    alignment(student, teacher, distance).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_no_rows_cost_nothing_and_stay_connected(distance):
    student = torch.randn(N, D).requires_grad_()
    loss = alignment_at(student, INDEX[:0], torch.empty(0, D), distance)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_the_host_never_reads_a_value(distance):
    student = torch.randn(N, D, device="meta").requires_grad_()
    # A meta tensor has no value to read: any .item(), nonzero or branch on one raises.
    alignment_at(student, INDEX.to("meta"), torch.randn(len(INDEX), D, device="meta"), distance).backward()
    assert student.grad.shape == student.shape


def test_an_unknown_distance_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"did you mean 'cosine'.*accepted: cosine, l2"):
        alignment(torch.zeros(1, 2), torch.zeros(1, 2), "cosin")
