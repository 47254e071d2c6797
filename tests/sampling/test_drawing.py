"""Draws follow the distribution they claim, and random numbers depend on their coordinates alone."""

from __future__ import annotations

import pytest
import torch

from decausal.sampling.drawing import choose, truncate, uniform_numbers

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf, 0.2, -3.0])
NUM_DRAWS = 20_000
CHI_SQUARE_999 = {2: 13.82, 6: 22.46, 99: 148.23}
"""Quantiles at 0.999 by degrees of freedom."""


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def draws(**options: float) -> torch.Tensor:
    numbers = uniform_numbers(torch.arange(NUM_DRAWS), 3, torch.full((NUM_DRAWS,), 7))
    return choose(LOGITS.expand(NUM_DRAWS, -1), numbers, **options)


def test_draws_follow_the_tempered_distribution() -> None:
    for temperature in (0.5, 1.0, 2.0):
        counts = draws(temperature=temperature).bincount(minlength=8).double()
        possible = LOGITS.isfinite()
        probabilities = (LOGITS.double() / temperature).softmax(-1)
        assert counts[~possible].sum() == 0
        assert chi_square(counts[possible], probabilities[possible]) < CHI_SQUARE_999[6]


def test_temperature_zero_takes_the_most_probable() -> None:
    assert (draws(temperature=0.0) == 0).all()


def test_top_k_keeps_the_k_most_probable_in_proportion() -> None:
    counts = draws(temperature=1.0, top_k=3).bincount(minlength=8).double()
    assert counts[3:].sum() == 0
    assert chi_square(counts[:3], LOGITS[:3].double().softmax(-1)) < CHI_SQUARE_999[2]


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    kept = {p: (truncate(logits, top_p=p) > -torch.inf)[0].tolist() for p in (0.3, 0.6, 0.76, 0.95, 1.0)}
    assert kept == {
        0.3: [False, True, False, False],
        0.6: [False, True, False, True],
        0.76: [False, True, True, True],
        0.95: [True, True, True, True],
        1.0: [True, True, True, True],
    }


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    # Of the top two, renormalised to 2/3 and 1/3, the first alone reaches 0.6; of all four it does not.
    assert (truncate(logits, top_k=2, top_p=0.6) > -torch.inf)[0].tolist() == [False, True, False, False]


def test_top_k_beyond_the_vocabulary_changes_nothing() -> None:
    assert torch.equal(truncate(LOGITS[None], top_k=100), LOGITS[None])


def test_impossible_tokens_are_not_drawn_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]).expand(2, -1)
    numbers = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert choose(logits, numbers, temperature=1.0).tolist() == [1, 3]


def test_numbers_are_uniform_along_every_coordinate() -> None:
    many = torch.arange(NUM_DRAWS)
    one = torch.zeros_like(many)
    along_steps = torch.cat([uniform_numbers(many[:100], step, one[:100]) for step in range(NUM_DRAWS // 100)])
    for numbers in (uniform_numbers(many, 0, one), uniform_numbers(one, 0, many), along_steps):
        assert numbers.min() > 0
        assert numbers.max() < 1
        counts = (numbers * 100).long().bincount(minlength=100).double()
        assert chi_square(counts, torch.full((100,), 0.01, dtype=torch.float64)) < CHI_SQUARE_999[99]


def test_numbers_of_neighbours_are_uncorrelated() -> None:
    many = torch.arange(NUM_DRAWS)
    base = uniform_numbers(many, 5, many * 0 + 9)
    neighbours = (
        uniform_numbers(many + 1, 5, many * 0 + 9),
        uniform_numbers(many, 6, many * 0 + 9),
        uniform_numbers(many, 5, many * 0 + 10),
    )
    for other in neighbours:
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 4 / NUM_DRAWS**0.5


def test_numbers_depend_on_their_own_coordinates_alone() -> None:
    seeds, positions = torch.tensor([3, 2**62 + 5, 0]), torch.tensor([0, 4095, 17])
    together = uniform_numbers(seeds, 8, positions)
    alone = torch.cat([uniform_numbers(seeds[i : i + 1], 8, positions[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("temperature", [0.5, 100.0])
def test_min_p_keeps_what_is_near_the_likeliest_untempered_token_whatever_the_temperature(temperature: float) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(3, -1)
    for number in torch.linspace(0.01, 0.99, 25):
        drawn = choose(
            logits,
            number.expand(3),
            temperature=torch.full((3,), temperature),
            min_p=torch.tensor([0.0, 0.29, 0.59]),
        )
        assert drawn[1] <= 2
        assert drawn[2] <= 1
        assert drawn[2] == choose(logits, number.expand(3), temperature=temperature, min_p=0.59)[0]
        assert drawn[0] == choose(logits, number.expand(3), temperature=temperature)[0]
