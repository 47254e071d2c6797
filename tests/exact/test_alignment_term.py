"""Identity 6: the alignment term equals its naive form, and vanishes with its gradient where the states agree."""

from __future__ import annotations

import pytest
import torch

from decausal.objectives.hidden import alignment, alignment_at

B, T, D = 3, 7, 10
INDEX = torch.tensor([1, 2, 5, 8, 13, 19])


def _states(dtype=torch.float64):
    return torch.randn(B, T, D, dtype=dtype).requires_grad_(), torch.randn(len(INDEX), D, dtype=dtype)


def _naive(student, teacher_rows, distance, weights):
    rows = student.flatten(0, -2)[INDEX]
    if distance == "cosine":
        distances = 1 - torch.nn.functional.cosine_similarity(rows, teacher_rows, dim=-1)
    else:
        distances = torch.nn.functional.mse_loss(rows, teacher_rows, reduction="none").mean(dim=-1)
    return (weights * distances).sum()


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_those_of_the_naive_form(distance, weighted):
    student, teacher_rows = _states()
    weights = torch.rand(len(INDEX), dtype=torch.float64) if weighted else None
    ours = alignment_at(student, INDEX, teacher_rows, distance, weights)
    expected = _naive(student, teacher_rows, distance, torch.ones(()) if weights is None else weights)
    assert torch.allclose(ours, expected, rtol=1e-12)
    assert torch.allclose(*torch.autograd.grad(ours * 0.3, student), *torch.autograd.grad(expected * 0.3, student))


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_summed_layer_by_layer_it_is_the_naive_loss_on_the_stack_of_all_layers(distance):
    students, teachers = torch.randn(4, B, T, D).requires_grad_(), torch.randn(4, len(INDEX), D)
    streamed = sum(alignment_at(s, INDEX, t, distance) for s, t in zip(students, teachers, strict=True))
    stacked_rows = students.flatten(1, 2)[:, INDEX]
    if distance == "cosine":
        stacked = (1 - torch.nn.functional.cosine_similarity(stacked_rows, teachers, dim=-1)).sum()
    else:
        stacked = (stacked_rows - teachers).square().mean(dim=-1).sum()
    assert torch.allclose(streamed, stacked, rtol=1e-5)
    streamed_gradient, stacked_gradient = (torch.autograd.grad(loss, students)[0] for loss in (streamed, stacked))
    assert torch.allclose(streamed_gradient, stacked_gradient, atol=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_gradients_are_the_finite_differences_of_the_value(distance):
    student, teacher_rows = _states()
    weights = torch.rand(len(INDEX), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: alignment_at(s, INDEX, teacher_rows, distance, weights), student)
    assert torch.autograd.gradcheck(lambda s: alignment(s, teacher_rows, distance), student[0, : len(INDEX)])


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_states_have_distance_0_and_gradient_0(distance, dtype):
    student = (torch.randn(B, T, D) * 50).to(dtype).requires_grad_()
    teacher_rows = student.detach().flatten(0, 1)[INDEX]
    loss = alignment_at(student, INDEX, teacher_rows, distance)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_cosine_does_not_see_length_and_its_gradient_is_orthogonal_to_the_state(factor):
    student, teacher_rows = _states()
    rows = student.detach().flatten(0, 1)[INDEX].requires_grad_()
    loss = alignment(rows, teacher_rows, "cosine")
    loss.backward()
    assert torch.allclose(alignment(rows * factor, teacher_rows / factor, "cosine"), loss)
    assert torch.allclose((rows.grad * rows).sum(dim=-1), torch.zeros(len(INDEX), dtype=torch.float64), atol=1e-12)


def test_small_angles_are_not_lost_to_rounding():
    teacher = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1) * 1000
    sideways = torch.randn(1, 64, dtype=torch.float64)
    sideways -= (sideways * teacher).sum() / teacher.double().square().sum() * teacher
    student = teacher + (sideways / sideways.norm() * 0.1).float()
    # An angle of 1e-4: 1 - cos is 5e-9, less than the rounding error of cos in fp32.
    assert alignment(student, teacher, "cosine").item() == pytest.approx(5e-9, rel=0.02)


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_rows_of_zeros_give_neither_nan_nor_gradient(zero):
    student, teacher = torch.randn(4, D), torch.randn(4, D)
    if zero in ("student", "both"):
        student[1] = 0
    if zero in ("teacher", "both"):
        teacher[1] = 0
    student.requires_grad_()
    loss = alignment(student[1:2], teacher[1:2], "cosine")
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if zero == "both" else 0.5)
    assert torch.allclose(student.grad, torch.zeros(4, D), atol=1e-6)
