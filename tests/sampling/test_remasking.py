"""Kept tokens that are opened again at random."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decausal.sampling.settings import SamplerSettings
from tests.sampling.denoising import Denoised, denoise
from tests.sampling.stand_ins import conversion_facts, written

TABLE = [[0.1, 0.2, 0.3, 0.4]] * 16
VOCAB_SIZE = 4


def run(is_open: Tensor, **options: Any) -> tuple[Denoised, list[Tensor]]:
    """Denoises, and tells what was masked before and after each step."""
    masked = [is_open]
    with pytest.MonkeyPatch.context() as patch:
        denoised = denoise(
            written(patch, TABLE),
            conversion_facts(VOCAB_SIZE),
            torch.zeros_like(is_open, dtype=torch.long),
            is_open,
            SamplerSettings().updated(**options),
            on_step=lambda step, ids, is_masked, new: masked.append(is_masked),
        )
    return denoised, masked


@settings(max_examples=15, deadline=None)
@given(
    num_open=st.integers(1, 16),
    num_steps=st.integers(1, 24),
    rate=st.sampled_from([1e-3, 0.2, 1.0]),
    kind=st.sampled_from(["remdm", "remdm_loop"]),
    order=st.sampled_from(["confidence", "random", "left_to_right"]),
)
def test_as_many_are_kept_after_each_step_as_its_schedule_says(
    num_open: int, num_steps: int, rate: float, kind: str, order: str
) -> None:
    is_open = (torch.arange(16) < num_open).expand(3, -1)
    denoised, masked = run(is_open, num_steps=num_steps, remask=kind, remask_rate=rate, order=order)
    kept = [num_open - after.sum(1) for after in masked]
    assert all((before <= after).all() for before, after in pairwise(kept))
    if kind == "remdm":
        due = [-(-step * num_open // num_steps) for step in range(num_steps + 1)]
        due = due[: due.index(num_open) + 1]
        assert [counts.tolist() for counts in kept] == [[count] * 3 for count in due]
        assert denoised.num_forwards.tolist() == [len(due) - 1] * 3
    assert (denoised.num_forwards <= num_steps).all()
    assert ((denoised.step_of_token >= 0) == is_open).all()
    assert (denoised.ids < VOCAB_SIZE).all()


def reopened(masked: list[Tensor]) -> list[int]:
    return [int((after & ~before).sum()) for before, after in pairwise(masked)]


def test_each_kept_token_is_opened_at_the_rate_but_never_more_than_can_be_kept_again() -> None:
    num_rows, num_steps, rate = 500, 16, 0.25
    _, masked = run(torch.ones(num_rows, 16, dtype=torch.bool), num_steps=num_steps, remask="remdm", remask_rate=rate)
    for step, opened in enumerate(reopened(masked)):
        num_kept, num_left = step, 16 - (step + 1)
        chance = min(rate, num_left / max(num_kept, 1))
        expected = num_rows * num_kept * chance
        if chance == rate and num_left > 6:  # further on, chance often asks for more than is left
            assert abs(opened - expected) <= 4 * (expected * (1 - rate)) ** 0.5
        assert opened <= num_rows * num_left
    assert reopened(masked)[-1] == 0


def test_a_loop_opens_tokens_in_its_middle_alone() -> None:
    num_steps = 100
    is_open = torch.ones(50, 10, dtype=torch.bool)
    _, masked = run(is_open, num_steps=num_steps, remask="remdm_loop", remask_rate=0.2)
    opened = reopened(masked)
    assert sum(opened[:45]) == 0
    assert sum(opened[95:]) == 0
    assert min(opened[50:95]) > 0
    assert [int(after.sum()) for after in masked[46:95]] == [50] * 49  # 0.9 of the positions are kept, 1 is open


@pytest.mark.parametrize("kind", ["remdm", "remdm_loop"])
def test_what_is_drawn_still_follows_the_models_distribution(kind: str) -> None:
    num_rows = 4000
    is_open = torch.ones(num_rows, 4, dtype=torch.bool)
    options = {"temperature": 1.0, "num_steps": 12, "remask_rate": 0.5, "order": "random", "seed": 3}
    denoised, masked = run(is_open, remask=kind, **options)
    assert sum(reopened(masked)) > num_rows / 4
    counts, expected = denoised.ids[:, 1].bincount(minlength=VOCAB_SIZE), torch.tensor(TABLE[0]) * num_rows
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.999


def test_a_rate_of_almost_nothing_is_no_remasking() -> None:
    is_open = torch.ones(8, 16, dtype=torch.bool)
    options = {"temperature": 1.0, "num_steps": 5}
    plain, _ = run(is_open, **options)
    rare, _ = run(is_open, remask="remdm", remask_rate=1e-12, **options)
    assert torch.equal(plain.ids, rare.ids)
    assert torch.equal(plain.step_of_token, rare.step_of_token)


def test_a_token_that_was_opened_is_drawn_anew() -> None:
    is_open = torch.ones(200, 16, dtype=torch.bool)
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        denoise(
            written(patch, TABLE),
            conversion_facts(VOCAB_SIZE),
            torch.zeros_like(is_open, dtype=torch.long),
            is_open,
            SamplerSettings(num_steps=8, temperature=1.0, remask="remdm", remask_rate=0.4),
            on_step=lambda step, ids, is_masked, new: seen.append(ids),
        )
    first, second = seen[3], seen[-1]
    was_kept = first < VOCAB_SIZE
    assert (first != second)[was_kept].any()
