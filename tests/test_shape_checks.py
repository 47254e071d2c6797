"""Shapes and types in signatures are checked while tests run, each by the quicker way that can."""

from __future__ import annotations

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from decausal.data import reading
from decausal.diffusion import noise, shift
from decausal.training.schedule import WeightSchedule


def test_wrong_shapes_are_found() -> None:
    shift.predicting_index(torch.arange(3), 1)
    with pytest.raises(TypeCheckError):
        shift.predicting_index(torch.zeros(2, 3, dtype=torch.int64), 1)
    row = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(TypeCheckError):  # two arguments that do not agree
        noise.draw_noise(row, torch.ones(4, dtype=torch.bool), position=0, seed=0, views=1)


def test_wrong_types_are_found_where_there_are_no_shapes() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        reading.say(3)
    with pytest.raises(BeartypeCallHintViolation):
        reading.Account().leave_out("a", 3)
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        WeightSchedule("heavy")
