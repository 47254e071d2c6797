"""Alignment: how far the student's hidden states are from the frozen autoregressive model's.

Called once per aligned layer, on target positions only. Sums run in fp32 (fp64 for fp64 states), but no fp32 copy lives
until the backward pass. That pass keeps the student's states (alive anyway), the teacher's rows in their dtype and
three scalars per row. It recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from decausal.errors import UserError, nearest

DISTANCES = ("cosine", "l2")


def alignment(
    student: Float[Tensor, "n D"],
    teacher: Float[Tensor, "n D"],
    distance: str,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the sum over rows of the distance between student and teacher, differentiable once, in `student` only.

    ``"cosine"`` is 1 - cos, computed as half the squared distance of the two directions, so that equal rows give a
    value and a gradient of exactly 0. A row of zeros has no direction: it counts as 0, lies 1/2 from any direction and
    gets no gradient. ``"l2"`` is the squared difference averaged over the D features.

    Args:
        student: The student's states, one row per aligned position.
        teacher: The teacher's states at the same positions.
        distance: ``"cosine"`` or ``"l2"``.
        weights: Per-row weights, not differentiated; 1 by default.

    Raises:
        UserError: For an unknown distance.

    Source: REPR-ALIGN (arXiv 2605.06885). The paper takes a mean over positions and layers. Here it is a sum, which the
    caller divides by a global count.
    """
    total: Tensor = _Alignment.apply(student, None, teacher, weights, _checked(distance))
    return total


def alignment_at(
    student: Float[Tensor, "*batch D"],
    student_index: Int[Tensor, " n"],
    teacher_rows: Float[Tensor, "n D"],
    distance: str,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Returns `alignment` of the student's rows at `student_index` (flat, into all of `student`), without copying them.

    Raises:
        UserError: For an unknown distance.
    """
    total: Tensor = _Alignment.apply(student, student_index, teacher_rows, weights, _checked(distance))
    return total


def _checked(distance: str) -> str:
    if distance not in DISTANCES:
        hint = nearest(distance, DISTANCES)
        raise UserError(f"alignment distance '{distance}' is not known{hint}; accepted: {', '.join(DISTANCES)}")
    return distance


class _Alignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, index: Tensor | None, teacher: Tensor, weights: Tensor | None, distance: str
    ) -> Tensor:
        rows, dtype = _rows(student, index), torch.promote_types(student.dtype, torch.float32)
        row_distances: Tensor
        scalars: tuple[Tensor, ...] = ()
        if distance == "cosine":
            student_inverse, teacher_inverse = _inverse_norm(rows, dtype), _inverse_norm(teacher, dtype)
            difference = (rows * student_inverse).sub_(teacher * teacher_inverse)
            row_distances = torch.linalg.vector_norm(difference, dim=-1).square() / 2
            scalars = (student_inverse, teacher_inverse, row_distances[:, None])
        else:
            row_distances = (rows.to(dtype) - teacher).square().mean(dim=-1)
        ctx.distance = distance
        ctx.save_for_backward(student, index, teacher, weights, *scalars)
        return (row_distances if weights is None else row_distances * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, index, teacher, weights, *scalars = ctx.saved_tensors
        rows, dtype = _rows(student, index), torch.promote_types(student.dtype, torch.float32)
        row_factor = grad_loss if weights is None else (grad_loss * weights)[:, None]
        if ctx.distance == "cosine":
            student_inverse, teacher_inverse, row_distances = scalars
            # Only the part of the difference that is orthogonal to the student's direction changes the angle. The part
            # along it is 1 - cos, the distance itself; without a direction of the teacher it is everything.
            along = torch.where(teacher_inverse > 0, row_distances, 1)
            row_factor = student_inverse * row_factor
            # One factor per row and operand, the same for both where states agree: the gradient is then exactly 0.
            grad_rows = rows * (student_inverse * (1 - along) * row_factor)
            grad_rows.sub_(teacher * (teacher_inverse * row_factor))
        else:
            grad_rows = (rows.to(dtype) - teacher).mul_(2 / student.shape[-1] * row_factor)
        return _scattered(grad_rows.to(student.dtype), index, student), None, None, None, None


def _rows(student: Tensor, index: Tensor | None) -> Tensor:
    return student if index is None else student.reshape(-1, student.shape[-1]).index_select(0, index)


def _scattered(grad_rows: Tensor, index: Tensor | None, student: Tensor) -> Tensor:
    if index is None:
        return grad_rows
    grad_student = torch.zeros_like(student, memory_format=torch.contiguous_format)
    grad_student.view(-1, student.shape[-1]).index_add_(0, index, grad_rows)
    return grad_student


def _inverse_norm(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 1 / |row| as a column of `dtype`; 0 for a row of zeros, which has no direction."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)
    return torch.where(norm > 0, 1 / norm, 0)
