"""Draft shapes as data: queries and tokens per pass, against closed forms, simulation and published figures."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.sampling.blocks.draft_shapes import (
    DraftShape,
    autoregressive,
    linear,
    quadratic,
    ragged,
    strided,
    tokens_per_pass,
)

ACCEPTANCES = st.lists(st.floats(0.02, 0.98), min_size=1, max_size=6)
KINDS = {"quadratic": quadratic, "strided": strided, "linear": linear, "ragged": ragged}


def declining(first: float, count: int) -> list[float]:
    return [first - 0.02 * place for place in range(count)]


def mean_and_last(acceptances: list[float]) -> tuple[float, float]:
    """E_m and A_m."""
    expected = reached = 1.0
    for chance in acceptances:
        reached *= chance
        expected += reached
    return expected, reached


def of_kind(kind: str, acceptances: list[float]) -> DraftShape:
    m = len(acceptances)
    return ragged(acceptances, 2 * m + 3) if kind == "ragged" else KINDS[kind](m)


@given(acceptances=ACCEPTANCES)
@settings(deadline=None)
def test_tokens_per_pass_are_those_of_the_closed_forms(acceptances: list[float]) -> None:
    m, (expected, last) = len(acceptances), mean_and_last(acceptances)
    assert tokens_per_pass(quadratic(m), acceptances) == pytest.approx(expected)
    assert tokens_per_pass(strided(m), acceptances) == pytest.approx((expected + 1 - last) / (2 - last))
    assert tokens_per_pass(linear(m), acceptances) == pytest.approx((expected + 1) / 2)


def test_queries_are_those_of_the_closed_forms() -> None:
    for m in range(1, 6):
        assert quadratic(m).num_queries(m) == (m + 1) ** 2
        assert (strided(m).num_queries(m), strided(m).num_queries(0)) == (2 * m + 1, m + 1)
        assert linear(m).num_queries(m) == linear(m).num_queries(0) == m + 1
        assert quadratic(m).num_queries(m, shift=0) == (m + 1) + (m + 1) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_acceptances_reproduce_the_tokens_per_pass(kind: str) -> None:
    generator, acceptances = random.Random(3), [0.8, 0.7, 0.75, 0.5]
    shape = of_kind(kind, acceptances)
    num_passes, num_tokens, pending = 40_000, 0, 0
    for _ in range(num_passes):
        num_right = 0
        while num_right < pending and generator.random() < acceptances[num_right]:
            num_right += 1
        num_tokens += num_right + 1
        pending = shape.groups[pending][num_right]
    assert num_tokens / num_passes == pytest.approx(tokens_per_pass(shape, acceptances), rel=0.01)


def test_without_drafts_a_pass_brings_one_token() -> None:
    for kind in (quadratic, strided, linear):
        assert kind(0) == autoregressive()
    assert ragged([0.9], 1) == autoregressive()
    assert autoregressive().num_queries(0) == 1
    assert tokens_per_pass(autoregressive(), []) == 1


@given(acceptances=st.lists(st.floats(0.1, 0.95), min_size=1, max_size=3), budget=st.integers(2, 9))
@settings(deadline=None, max_examples=20)
def test_no_groups_within_the_budget_bring_more_than_the_ragged_ones(acceptances: list[float], budget: int) -> None:
    best = ragged(acceptances, budget)
    assert all(best.num_queries(d) <= budget for d in range(best.most_pending + 1))
    m = min(best.most_pending, 2)  # with more there are too many to try
    by_pending = [
        [lengths for lengths in product(range(m + 1), repeat=d + 1) if 1 + d + sum(lengths) <= budget]
        for d in range(m + 1)
    ]
    found = tokens_per_pass(best, acceptances)
    for groups in product(*by_pending):
        assert tokens_per_pass(DraftShape("any", groups), acceptances) <= found + 1e-6


@pytest.mark.parametrize("kind", [quadratic, strided, linear])
def test_ragged_groups_are_at_least_as_good_as_any_other_of_as_many_queries(kind: type) -> None:
    for first in (0.65, 0.8, 0.9):
        acceptances = declining(first, 5)
        shape = kind(5)
        budget = max(shape.num_queries(d) for d in range(6))
        assert tokens_per_pass(ragged(acceptances, budget), acceptances) >= tokens_per_pass(shape, acceptances) - 1e-9


def test_published_and_computed_figures_are_reproduced() -> None:
    # I-DLM on MATH-500: at E_3 = 3.46 and 54.7 of 77.3 warm passes full, 2.93 tokens per pass were measured.
    full, refused, cold = 0.547, 0.226, 0.227
    last = full / (full + refused)
    assert (3.46 + 1 - last) / (2 - last) == pytest.approx(2.93, rel=0.015)
    assert (1 - last) / (2 - last) == pytest.approx(cold, abs=0.002)
    # Computed for 180 queries per pass, which an H200 has free.
    for acceptances, batch_1, batch_8, batch_32 in [
        ([0.65] * 12, 2.85, 2.48, 1.76),
        ([0.8] * 12, 4.73, 3.30, 2.18),
        (declining(0.9, 12), 5.73, 3.88, 2.47),
    ]:
        assert tokens_per_pass(quadratic(12), acceptances) == pytest.approx(batch_1, abs=0.006)
        assert tokens_per_pass(ragged(acceptances, 180 // 8), acceptances) == pytest.approx(batch_8, abs=0.006)
        assert tokens_per_pass(linear(4), acceptances) == pytest.approx(batch_32, abs=0.006)
    assert ragged(declining(0.9, 12), 22).groups[6] == (2, 2, 2, 2, 2, 1, 4)
