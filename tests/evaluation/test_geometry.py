"""Cosines of hidden states: 1 where nothing differs, and only states that were asked for count."""

from __future__ import annotations

import pytest
import torch

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.evaluation.geometry import layer_cosines
from decausal.models.backbone import body_forward
from tests.evaluation.rows import alone, converted, packed_row
from tests.families import FAMILIES

CAUSAL, BIDIRECTIONAL = Layout("causal"), Layout("bidirectional")
ROWS = [packed_row(7, 5, padding=2), packed_row(14, seed=1), packed_row(1, 4, 9, seed=2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_all_of_itself_under_the_causal_layout(family):
    model = FAMILIES[family]()
    assert layer_cosines(model, CAUSAL, model, ROWS) == pytest.approx([1, 1, 1], abs=1e-6)


def test_reading_both_ways_leaves_the_embeddings_and_changes_the_rest():
    model = FAMILIES["llama"]()
    embeddings, *layers = layer_cosines(model, BIDIRECTIONAL, model, ROWS)
    assert embeddings == pytest.approx(1, abs=1e-6)
    assert all(-1 <= cosine < 0.999 for cosine in layers)


def test_the_mean_is_over_states_by_hand():
    student, teacher = FAMILIES["llama"](), FAMILIES["llama"](seed=1)
    row = packed_row(9)
    with torch.no_grad():
        ours = body_forward(student, row["clean_ids"][None], BIDIRECTIONAL, output_hidden_states=True).hidden_states
        theirs = body_forward(teacher, row["clean_ids"][None], CAUSAL, output_hidden_states=True).hidden_states
    expected = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(ours, theirs, strict=True)]
    assert layer_cosines(student, BIDIRECTIONAL, teacher, [row]) == pytest.approx(expected, abs=1e-6)


def test_padding_and_neighbours_do_not_count():
    student, teacher = FAMILIES["llama"](), FAMILIES["llama"](seed=1)
    documents = [(alone(ROWS[0], document), size) for document, size in ((0, 7), (1, 5))]
    singles = [torch.tensor(layer_cosines(student, BIDIRECTIONAL, teacher, [row])) * n for row, n in documents]
    packed = layer_cosines(student, BIDIRECTIONAL, teacher, [ROWS[0]])
    assert packed == pytest.approx((sum(singles) / 12).tolist(), abs=1e-6)


def test_the_batch_size_changes_nothing():
    student, teacher = FAMILIES["llama"](), FAMILIES["llama"](seed=1)
    one, four = (layer_cosines(student, BIDIRECTIONAL, teacher, ROWS, batch_size=size) for size in (1, 4))
    assert one == pytest.approx(four, abs=1e-6)


def test_noise_reaches_the_student_only_and_its_masked_tokens_are_the_targets():
    model, facts, _ = converted()
    noise = {"level": 0.5, "mask_token_id": facts.mask_token_id, "shift": 0}
    visible = layer_cosines(model, CAUSAL, model, ROWS, positions="visible", **noise)
    targets = layer_cosines(model, CAUSAL, model, ROWS, positions="targets", **noise)
    everything = layer_cosines(model, CAUSAL, model, ROWS, **noise)
    assert visible[0] == pytest.approx(1, abs=1e-6)  # embeddings of tokens that both see
    assert targets[0] < 0.9
    assert targets[0] < everything[0] < visible[0]


def test_all_masked_leaves_only_first_tokens_visible():
    model, facts, _ = converted()
    noise = {"level": 1.0, "mask_token_id": facts.mask_token_id}
    # Under the causal layout a first token reads itself alone: its states are the teacher's.
    cosines = layer_cosines(model, CAUSAL, model, ROWS, positions="visible", **noise)
    assert cosines == pytest.approx([1, 1, 1], abs=1e-6)


def test_modes_come_back():
    student, teacher = FAMILIES["llama"]().train(), FAMILIES["llama"]()
    layer_cosines(student, BIDIRECTIONAL, teacher, ROWS)
    assert (student.training, teacher.training) == (True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.5, "mask_token_id": 1}, "level is 1.5"),
        ({"level": 0.5}, "mask_token_id"),
        ({"positions": "targets"}, "nothing is masked"),
        ({"num_rows": 0}, "num_rows 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    model = FAMILIES["llama"]()
    with pytest.raises(UserError, match=message):
        layer_cosines(model, CAUSAL, model, ROWS, **options)
