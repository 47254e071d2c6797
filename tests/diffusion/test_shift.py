"""Which state predicts a token."""

from __future__ import annotations

import pytest
import torch

from decausal.diffusion.shift import predictable, predicting_index
from decausal.errors import UserError

DOCUMENT_IDS = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]])


def test_shift_0_predicts_every_token_but_padding():
    assert predictable(DOCUMENT_IDS, 0).tolist() == (DOCUMENT_IDS >= 0).tolist()


def test_shift_1_predicts_no_first_token_and_no_padding():
    expected = [[0, 1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert predictable(DOCUMENT_IDS, 1).int().tolist() == expected


@pytest.mark.parametrize("shift", [0, 1])
def test_the_predicting_state_lies_in_the_tokens_own_row_and_document(shift):
    row_length = DOCUMENT_IDS.shape[1]
    token_index = predictable(DOCUMENT_IDS, shift).flatten().nonzero().squeeze(1)
    state_index = predicting_index(token_index, shift)
    assert torch.equal(state_index + shift, token_index)
    assert torch.equal(state_index // row_length, token_index // row_length)
    assert torch.equal(DOCUMENT_IDS.flatten()[state_index], DOCUMENT_IDS.flatten()[token_index])


def test_other_shifts_are_refused():
    with pytest.raises(UserError, match="shift 2"):
        predictable(DOCUMENT_IDS, 2)
    with pytest.raises(UserError, match="shift -1"):
        predicting_index(torch.tensor([1]), -1)
