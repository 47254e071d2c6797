"""Masks and levels: pure in (seed, position), right in distribution, evenly spread."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.diffusion.layout import block_numbers
from decausal.diffusion.noise import EPSILON, draw_noise, noise_levels
from decausal.errors import UserError

seeds = st.integers(-(2**63), 2**64)
positions = st.integers(0, 10**8)


@st.composite
def packed_rows(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=0, max_size=5))
    padding = draw(st.integers(0, 5))
    ids = [document for document, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    is_maskable = [draw(st.booleans()) and document >= 0 for document in ids]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(is_maskable, dtype=torch.bool)


@settings(max_examples=50, deadline=None)
@given(row=packed_rows(), seed=seeds, position=positions, stratified=st.booleans())
def test_complementary_views_partition_the_maskable_tokens(row, seed, position, stratified):
    document_ids, is_maskable = row
    noise = draw_noise(
        document_ids,
        is_maskable,
        position=position,
        seed=seed,
        views=2,
        complementary=True,
        stratified=stratified,
    )
    first, second = noise.is_masked
    assert not (first & second).any()
    assert torch.equal(first | second, is_maskable)
    assert torch.equal(noise.level[1][document_ids >= 0], 1 - noise.level[0][document_ids >= 0])


@settings(max_examples=50, deadline=None)
@given(row=packed_rows(), seed=seeds, position=positions, views=st.integers(1, 4), stratified=st.booleans())
def test_only_maskable_tokens_are_masked_and_levels_are_one_per_document(row, seed, position, views, stratified):
    document_ids, is_maskable = row
    noise = draw_noise(
        document_ids, is_maskable, position=position, seed=seed, views=views, complementary=False, stratified=stratified
    )
    assert noise.is_masked.shape == noise.level.shape == (views, len(document_ids))
    assert not (noise.is_masked & ~is_maskable).any()
    assert (noise.level[:, document_ids < 0] == 1).all()
    for document in document_ids.unique():
        level = noise.level[:, document_ids == document]
        assert torch.equal(level, level[:, :1].expand_as(level))
    assert ((noise.level >= EPSILON) & (noise.level <= 1)).all()


@settings(max_examples=50, deadline=None)
@given(row=packed_rows(), seed=seeds, position=positions, complementary=st.booleans(), block_size=st.integers(1, 7))
def test_each_block_with_a_maskable_token_has_a_level_of_its_own(row, seed, position, complementary, block_size):
    document_ids, is_maskable = row
    noise = draw_noise(
        document_ids,
        is_maskable,
        position=position,
        seed=seed,
        views=2,
        complementary=complementary,
        block_size=block_size,
    )
    number = block_numbers(document_ids[None], block_size)[0]
    levels = []
    for block in number.unique().tolist():
        inside = number == block
        level = noise.level[:, inside]
        assert torch.equal(level, level[:, :1].expand_as(level))
        if block >= 0 and (is_maskable & inside).any():
            levels += level[: 1 if complementary else 2, 0].tolist()
        else:
            assert (level == 1).all()
    assert not (noise.is_masked & ~is_maskable).any()
    if complementary:
        assert torch.equal(noise.is_masked.sum(0), is_maskable.long())
    assert _discrepancy(torch.tensor(levels)) <= 1 / max(1, len(levels)) + 2 * EPSILON


@settings(max_examples=25, deadline=None)
@given(row=packed_rows(), seed=seeds)
def test_one_block_for_each_document_gives_the_noise_of_documents(row, seed):
    document_ids, _ = row
    is_maskable = document_ids >= 0
    by_document, by_block = (
        draw_noise(document_ids, is_maskable, position=3, seed=seed, views=2, block_size=block_size)
        for block_size in (None, 20)
    )
    assert torch.equal(by_document.level, by_block.level)
    assert torch.equal(by_document.is_masked, by_block.is_masked)


def test_a_row_with_nothing_maskable_gets_no_masks():
    nothing = torch.zeros(64, dtype=torch.bool)
    noise = draw_noise(torch.arange(64) // 8, nothing, position=0, seed=0, views=2, complementary=True)
    assert not noise.is_masked.any()


def test_noise_is_a_function_of_seed_and_position_alone():
    document_ids, is_maskable = torch.arange(256) // 32, torch.ones(256, dtype=torch.bool)

    def draw(position, seed):
        return draw_noise(document_ids, is_maskable, position=position, seed=seed, views=2)

    first = draw(5, 7)
    global_state = torch.get_rng_state()
    draw(6, 7)
    torch.rand(3)
    again = draw(5, 7)
    assert torch.equal(first.is_masked, again.is_masked)
    assert torch.equal(first.level, again.level)
    assert not torch.equal(first.is_masked, draw(6, 7).is_masked)
    assert not torch.equal(first.is_masked, draw(5, 8).is_masked)
    torch.set_rng_state(global_state)
    draw(0, 0)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("complementary", [True, False])
def test_the_masked_fraction_is_the_level(stratified, complementary):
    length = 20_000
    document_ids = torch.arange(length) * 2 // length
    noise = draw_noise(
        document_ids,
        torch.ones(length, dtype=torch.bool),
        position=11,
        seed=3,
        views=2,
        complementary=complementary,
        stratified=stratified,
    )
    for document in (0, 1):
        inside = document_ids == document
        fraction, level = noise.is_masked[:, inside].double().mean(dim=1), noise.level[:, inside][:, 0].double()
        standard_error = (level * (1 - level) / inside.sum()).sqrt()
        assert ((fraction - level).abs() < 4 * standard_error).all()


def test_independent_views_mask_independently():
    length = 20_000
    noise = draw_noise(
        torch.zeros(length, dtype=torch.long), torch.ones(length, dtype=torch.bool), position=0, seed=5, views=2
    )
    both = (noise.is_masked[0] & noise.is_masked[1]).double().mean()
    assert both == pytest.approx(noise.level[:, 0].double().prod().item(), abs=0.015)
    assert noise.level[0, 0] != noise.level[1, 0]


def _discrepancy(level: torch.Tensor) -> float:
    """Star discrepancy: the largest gap between the empirical distribution of `level` and the uniform one."""
    if not len(level):
        return 0.0
    ordered, n = level.double().sort().values, len(level)
    above, below = torch.arange(1, n + 1) / n - ordered, ordered - torch.arange(n) / n
    return max(above.max().item(), below.max().item())


@settings(max_examples=60, deadline=None)
@given(start=positions, seed=seeds, n=st.integers(4, 400))
def test_any_run_of_positions_has_evenly_spread_levels(start, seed, n):
    level = torch.cat([noise_levels(start + i, seed, 1, stratified=True, epsilon=0.0) for i in range(n)])
    assert _discrepancy(level) <= (1 + math.log(n)) / n


@settings(max_examples=30, deadline=None)
@given(position=positions, seed=seeds, num_levels=st.integers(1, 40))
def test_levels_of_one_position_are_one_per_stratum(position, seed, num_levels):
    level = noise_levels(position, seed, num_levels, stratified=True, epsilon=0.0)
    assert _discrepancy(level) <= 1 / num_levels + 1e-6


def test_independent_levels_are_spread_as_chance_has_it():
    n = 4000
    level = torch.cat([noise_levels(i, 0, 1, stratified=False, epsilon=0.0) for i in range(n)])
    # Kolmogorov: exceeded once in 100,000 draws; and stratified levels would lie far below the lower bound.
    assert (1 + math.log(n)) / n < _discrepancy(level) < 2.5 / math.sqrt(n)


def test_levels_are_uniform_over_seeds():
    level = torch.cat([noise_levels(17, seed, 1, stratified=True, epsilon=0.0) for seed in range(4000)])
    assert _discrepancy(level) < 2.5 / math.sqrt(4000)


def test_levels_keep_their_distance_from_0_and_1():
    level = torch.cat([noise_levels(i, 0, 1, stratified=True) for i in range(2000)])
    assert level.min() == pytest.approx(1 / 500)
    assert level.max() == pytest.approx(1 - 1 / 500)


@pytest.mark.parametrize(("views", "complementary"), [(1, True), (3, True), (0, False)])
def test_impossible_views_are_refused(views, complementary):
    row = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    with pytest.raises(UserError, match="views"):
        draw_noise(*row, position=0, seed=0, views=views, complementary=complementary)
