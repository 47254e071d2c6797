"""Settings of many rows as tensors: each row is chosen, scored and counted as it would be alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.sampling.confidence import confidence, entropies
from decausal.sampling.drawing import choose, uniform_numbers
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.selection import best, num_to_keep
from decausal.sampling.settings import CONFIDENCES, SamplerSettings

CPU = torch.device("cpu")
V, T = 12, 6

rows_of_settings = st.lists(
    st.builds(
        lambda draw, order, schedule: SamplerSettings(confidence=order, **draw, **schedule),
        st.sampled_from(
            [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"temperature": 1.0, "top_p": 0.6, "top_k": 5}]
        ),
        st.sampled_from(CONFIDENCES),
        st.sampled_from(
            [{"num_steps": 2}, {"num_steps": 40}, {"threshold": 0.4}, {"entropy_bound": 0.0}, {"entropy_bound": 3.0}]
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_settings, seed=st.integers(0, 1000))
def test_rows_are_chosen_and_scored_as_each_alone(rows: list[SamplerSettings], seed: int) -> None:
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed)) * 2
    numbers = uniform_numbers(torch.arange(len(rows)), 0, torch.arange(len(rows)))
    together = RowSettings.of(rows, CPU)
    tokens = together.chosen(logits, numbers)
    scores = together.scored(logits, tokens)
    for row, own in enumerate(rows):
        here = slice(row, row + 1)
        alone = choose(logits[here], numbers[here], temperature=own.temperature, top_k=own.top_k, top_p=own.top_p)
        assert tokens[row] == alone
        expected = confidence(logits[here], alone, own.confidence)
        if own.entropy_bound is not None:
            expected = -entropies(logits[here])
        torch.testing.assert_close(scores[here], expected)


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_settings, seed=st.integers(0, 1000), step=st.integers(0, 2))
def test_rows_are_counted_as_each_alone(rows: list[SamplerSettings], seed: int, step: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_open = torch.rand(len(rows), T, generator=generator) < 0.8
    is_open[:, 0] = True
    is_masked = is_open & (torch.rand(len(rows), T, generator=generator) < 0.7)
    is_masked[:, 0] = True
    scores = torch.rand(len(rows), T, generator=generator).masked_fill(~is_masked, -torch.inf)
    is_bounded = torch.tensor([own.entropy_bound is not None for own in rows])
    scores = torch.where(is_bounded[:, None], scores - 2, scores)
    steps = torch.full((len(rows),), step)
    count = num_to_keep(scores, is_open, is_masked, RowSettings.of(rows, CPU), steps)
    for row, own in enumerate(rows):
        here = slice(row, row + 1)
        alone = RowSettings.of([own], CPU)
        assert count[row] == num_to_keep(scores[here], is_open[here], is_masked[here], alone, step)
        if own.num_steps is None:
            assert count[row] >= 1


def bounded(entropy: list[float], bound: float) -> list[bool]:
    scores = -torch.tensor([entropy])
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    own = RowSettings.of([SamplerSettings(entropy_bound=bound)], CPU)
    return best(scores, num_to_keep(scores, everywhere, everywhere, own, 0))[0].tolist()


def test_the_entropy_bound_holds_for_all_kept_but_the_last() -> None:
    entropy = [0.5, 0.1, 2.0, 0.3]
    assert bounded(entropy, 0.0) == [False, True, False, False]
    assert bounded(entropy, 0.1) == [False, True, False, True]
    assert bounded(entropy, 0.41) == [True, True, False, True]
    assert bounded(entropy, 0.89) == [True, True, False, True]
    assert bounded(entropy, 0.91) == [True] * 4
    assert bounded([0.0, 0.0, 1.0, 1.0], 0.0) == [True, True, True, False]


def test_a_row_that_does_not_bound_entropy_is_not_touched_by_one_that_does() -> None:
    own = SamplerSettings(threshold=0.5)
    rows = RowSettings.of([own, replace(own, threshold=None, entropy_bound=1.0)], CPU)
    scores = torch.tensor([[0.9, 0.6, 0.2], [-0.1, -0.2, -3.0]])
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    assert num_to_keep(scores, everywhere, everywhere, rows, 0).tolist() == [2, 3]
