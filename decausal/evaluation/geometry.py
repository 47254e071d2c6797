"""How much of the autoregressive model's representation a student keeps: cosines of hidden states by layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from decausal.data.stream import AlignedPositions, Rows
from decausal.diffusion.layout import Layout
from decausal.diffusion.noise import uniforms
from decausal.diffusion.shift import predicting_index
from decausal.errors import UserError
from decausal.evaluation.passes import (
    device_of,
    documents_if_packed,
    in_batches,
    measuring,
    predicted_tokens,
    spread_indices,
)
from decausal.models.backbone import body_forward

CAUSAL = Layout("causal")


def layer_cosines(
    student: nn.Module,
    student_layout: Layout,
    teacher: nn.Module,
    rows: Rows,
    *,
    num_rows: int | None = None,
    positions: AlignedPositions = "all",
    level: float = 0.0,
    mask_token_id: int | None = None,
    shift: int = 1,
    batch_size: int = 8,
    seed: int = 0,
) -> list[float]:
    """Returns the mean cosine between the student's states and the teacher's, for each of the L + 1 hidden states.

    The teacher reads the clean row causally, as in training. The student reads the clean row, or with `level` a noised
    one, under its own layout. State 0 is the embedding output, and state L the one after the final norm.

    Args:
        student: The converted model.
        student_layout: Its layout.
        teacher: The autoregressive model.
        rows: Packed rows, see `decausal.data.stream.Rows`.
        num_rows: How many rows to measure, spread evenly. None: all.
        positions: States to compare: "all" except padding, "targets" (which predict a masked token), or "visible"
            (whose own token is not masked).
        level: Chance that a token is masked for the student, in [0, 1]; 0 leaves the row clean.
        mask_token_id: The student's mask token, needed if `level` is above 0.
        shift: The student's shift, which decides which states are "targets".
        batch_size: Rows per forward pass.
        seed: Seed of the noise, which is a function of (seed, row index).

    Raises:
        UserError: An option is out of range, or there is no state to compare.
    """
    _check(level, mask_token_id, positions)
    sums, num_states = None, 0
    with measuring(student, teacher):
        for indices in in_batches(spread_indices(rows, num_rows), batch_size):
            batch = [rows[index] for index in indices]
            clean_ids, document_ids = (
                torch.stack([row[name] for row in batch]) for name in ("clean_ids", "document_ids")
            )
            is_masked = torch.stack(
                [_masked_at(level, row, index, seed) for row, index in zip(batch, indices, strict=True)]
            )
            student_ids = clean_ids if mask_token_id is None else clean_ids.masked_fill(is_masked, mask_token_id)
            index = _state_index(positions, is_masked, document_ids, shift)
            student_states = _states(student, student_layout, student_ids, document_ids)
            teacher_states = _states(teacher, CAUSAL, clean_ids, document_ids)
            batch_sums = _summed_cosines(student_states, teacher_states, index)
            sums = batch_sums if sums is None else sums + batch_sums
            num_states += len(index)
    if not num_states:
        raise UserError(f"no state to compare at positions '{positions}', level {level}; raise num_rows or level")
    return (sums / num_states).tolist()


def _masked_at(level: float, row: dict[str, Tensor], row_index: int, seed: int) -> Bool[Tensor, " T"]:
    is_predicted = predicted_tokens(row)
    return (uniforms(tuple(is_predicted.shape), position=row_index, seed=seed) < level) & is_predicted


def _state_index(
    positions: AlignedPositions, is_masked: Bool[Tensor, "B T"], document_ids: Int[Tensor, "B T"], shift: int
) -> Int[Tensor, " n"]:
    if positions == "targets":
        return predicting_index(is_masked.flatten().nonzero()[:, 0], shift)
    is_compared = document_ids >= 0
    if positions == "visible":
        is_compared = is_compared & ~is_masked
    return is_compared.flatten().nonzero()[:, 0]


def _states(
    model: nn.Module, layout: Layout, input_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T D"], ...]:
    device, packed = device_of(model), documents_if_packed(document_ids)
    output = body_forward(
        model,
        input_ids.to(device),
        layout,
        document_ids=None if packed is None else packed.to(device),
        output_hidden_states=True,
    )
    return output.hidden_states


def _summed_cosines(
    student_states: tuple[Float[Tensor, "B T D"], ...],
    teacher_states: tuple[Float[Tensor, "B T D"], ...],
    index: Int[Tensor, " n"],
) -> Float[Tensor, " L1"]:
    """Returns the sum over the states at `index` of each layer's cosine, in fp64."""
    sums = []
    for student, teacher in zip(student_states, teacher_states, strict=True):
        place = index.to(student.device)
        ours = student.flatten(0, 1)[place].double()
        theirs = teacher.flatten(0, 1)[index.to(teacher.device)].to(ours)
        sums.append(torch.nn.functional.cosine_similarity(ours, theirs, dim=1).sum().cpu())
    return torch.stack(sums)


def _check(level: float, mask_token_id: int | None, positions: AlignedPositions) -> None:
    if not 0 <= level <= 1:
        raise UserError(f"level is {level}; accepted: 0 (clean) to 1 (all masked)")
    if level and mask_token_id is None:
        raise UserError(f"level is {level} but mask_token_id is not given; give the student's")
    if positions == "targets" and not level:
        raise UserError("positions 'targets' with level 0: nothing is masked, so there are no targets; give a level")
