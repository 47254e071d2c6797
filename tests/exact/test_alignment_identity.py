"""Identity 6 through the real thing: Teacher, Collator and loss_sums on every family."""

from __future__ import annotations

import pytest
import torch

from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward
from decausal.training.losses import Supervision, loss_sums
from decausal.training.questions import Vocabulary, ask
from decausal.training.terms import AlignmentTerm
from tests.families import FAMILIES, VOCAB_SIZE
from tests.runs import adapted, teacher_of, uneven_rows

LAYERS = (0, 1, 2)
every_family = pytest.mark.parametrize("family", FAMILIES)


def a_batch(mask_token_id: int, *, packed: bool, aligned_positions: str = "targets") -> dict[str, torch.Tensor]:
    rows = uneven_rows()
    if not packed:
        for row in rows:
            row["document_ids"] = torch.zeros_like(row["document_ids"])
    stream = TrainingStream(rows, 8, seed=0, shift=1, noising=Noising(2))
    batch = Collator(mask_token_id, 1, aligned_positions=aligned_positions)([stream[2], stream[3]])
    assert ("document_ids" in batch) == packed
    return batch


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@every_family
def test_a_causal_student_on_the_clean_row_is_at_distance_0_with_gradient_0(family, packed):
    student, mask_token_id = adapted(family)
    batch = a_batch(mask_token_id, packed=packed, aligned_positions="all")
    batch["noised_ids"] = batch["clean_ids"].repeat_interleave(2, dim=0)
    supervision, term = Supervision(Layout("causal"), mask_token_id), AlignmentTerm(LAYERS)
    answers = ask(teacher_of(family), term.questions, batch, Vocabulary(VOCAB_SIZE, mask_token_id))
    distance = loss_sums(student, batch, supervision, [term], answers)[term] / len(batch["aligned_index"])
    assert distance.item() <= 1e-12
    distance.backward()
    largest = max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None)
    assert largest <= 1e-5

    batch["noised_ids"] = a_batch(mask_token_id, packed=packed)["noised_ids"]
    assert loss_sums(student, batch, supervision, [term], answers)[term] / len(batch["aligned_index"]) > 1e-3


@every_family
def test_streamed_teacher_states_are_the_stock_models_hidden_states(family):
    mask_token_id = adapted(family)[1]
    batch = a_batch(mask_token_id, packed=False)
    teacher = teacher_of(family)
    with torch.no_grad():
        stock = teacher.model(batch["clean_ids"], output_hidden_states=True, use_cache=False).hidden_states
        norm = body_forward(teacher.model, batch["clean_ids"], Layout("causal")).last_hidden_state
    expected = [*stock[:-1], norm]
    found = teacher.states(batch["clean_ids"], batch["teacher_index"], (2, 0, 1))
    for layer, states in zip((2, 0, 1), found, strict=True):
        torch.testing.assert_close(states, expected[layer].flatten(0, 1)[batch["teacher_index"]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("views", [1, 2])
def test_each_aligned_state_meets_the_teachers_state_of_the_same_row_and_position(views):
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=Noising(views))
    batch = Collator(5, 1)([stream[position] for position in range(4)])
    length = batch["clean_ids"].shape[1]
    row, position = batch["aligned_index"] // length, batch["aligned_index"] % length
    assert torch.equal(batch["teacher_index"], row // views * length + position)
