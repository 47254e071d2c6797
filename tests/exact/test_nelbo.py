"""Identity 4: the NELBO, four ways: enumeration, any-order likelihood, blocks of one, Monte-Carlo."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from decausal.diffusion.nelbo import draw_patterns, draw_unit_patterns, nelbo_exact, nelbo_samples

V = 5
TOKENS = torch.tensor([3, 0, 4, 1, 2, 2])
EVERYTHING = torch.ones(6, dtype=torch.bool)
PARTLY = torch.tensor([True, False, True, True, False, True])


class ToyConditional:
    """An arbitrary conditional model: logits of each token are a fixed nonlinear function of the unmasked tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.by_token = torch.randn(len(TOKENS), V + 1, 8, generator=generator, dtype=torch.float64)
        self.readout = torch.randn(len(TOKENS), 8, V, generator=generator, dtype=torch.float64)

    def __call__(self, is_masked: torch.Tensor) -> torch.Tensor:
        seen = torch.where(is_masked, V, TOKENS)
        context = self.by_token[torch.arange(len(TOKENS)), seen].sum(dim=1).tanh()
        log_probs = torch.einsum("pd,tdv->ptv", context, self.readout).log_softmax(dim=-1)
        return log_probs[:, torch.arange(len(TOKENS)), TOKENS]


def _mean_nll(model: ToyConditional, is_maskable: torch.Tensor, orders: list[tuple[int, ...]]) -> float:
    """Mean over orders of the negative log-likelihood of tokens that are generated one by one in that order."""
    steps = [(order[:number], place) for order in orders for number, place in enumerate(order)]
    is_masked = is_maskable.repeat(len(steps), 1)
    for row, (known, _) in enumerate(steps):
        is_masked[row, list(known)] = False
    places = torch.tensor([place for _, place in steps])
    return -model(is_masked)[torch.arange(len(steps)), places].sum().item() / len(orders)


@pytest.mark.parametrize("is_maskable", [EVERYTHING, PARTLY], ids=["everything", "partly"])
def test_enumeration_equals_the_mean_likelihood_over_all_generation_orders(is_maskable):
    model, places = ToyConditional(), is_maskable.nonzero().squeeze(1).tolist()
    any_order = _mean_nll(model, is_maskable, list(permutations(places)))
    assert nelbo_exact(model, is_maskable) == pytest.approx(any_order, rel=1e-12)


@pytest.mark.parametrize("is_maskable", [EVERYTHING, PARTLY], ids=["everything", "partly"])
def test_block_size_one_is_the_autoregressive_likelihood(is_maskable):
    model, places = ToyConditional(), is_maskable.nonzero().squeeze(1).tolist()
    left_to_right = _mean_nll(model, is_maskable, [tuple(places)])
    assert nelbo_exact(model, is_maskable, block_size=1) == pytest.approx(left_to_right, rel=1e-12)


def test_blocks_are_left_to_right_over_blocks_and_any_order_inside():
    model = ToyConditional()
    orders = [
        (*first, *second, *third)
        for first in permutations((0, 1))
        for second in permutations((2, 3))
        for third in permutations((4, 5))
    ]
    expected = _mean_nll(model, EVERYTHING, orders)
    assert nelbo_exact(model, EVERYTHING, block_size=2) == pytest.approx(expected, rel=1e-12)


def test_one_block_for_all_is_no_blocks():
    model = ToyConditional()
    assert nelbo_exact(model, EVERYTHING, block_size=6) == nelbo_exact(model, EVERYTHING)


@pytest.mark.parametrize("estimator", ["count", "level"])
@pytest.mark.parametrize("is_maskable", [EVERYTHING, PARTLY], ids=["everything", "partly"])
def test_monte_carlo_mean_is_the_enumerated_value(estimator, is_maskable):
    model = ToyConditional()
    samples = nelbo_samples(model, is_maskable, 20_000, seed=2, estimator=estimator)
    standard_error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean() - nelbo_exact(model, is_maskable)) < 4 * standard_error


def test_counting_masked_tokens_varies_less_than_dividing_by_the_level():
    count, level = (
        nelbo_samples(ToyConditional(), EVERYTHING, 20_000, seed=0, estimator=e) for e in ("count", "level")
    )
    assert count.var() < level.var() / 2


@pytest.mark.parametrize("estimator", ["count", "level"])
def test_one_sample_per_row_over_many_rows_has_the_same_mean(estimator):
    model = ToyConditional()
    samples = torch.cat(
        [nelbo_samples(model, EVERYTHING, 1, seed=4, position=i, estimator=estimator) for i in range(1500)]
    )
    assert abs(samples.mean() - nelbo_exact(model, EVERYTHING)) < 4 * samples.std() / math.sqrt(len(samples))


def test_patterns_of_a_row_serve_each_of_its_documents():
    model = ToyConditional()
    is_first_document = torch.tensor([True, True, True, False, False, False])
    patterns = draw_patterns(EVERYTHING, 20_000, seed=6)

    is_masked = patterns.is_masked & is_first_document
    of_document = -torch.where(is_masked, model(is_masked), 0).sum(dim=1) * patterns.weight
    expected = nelbo_exact(model, is_first_document)
    assert abs(of_document.mean() - expected) < 4 * of_document.std() / math.sqrt(len(of_document))


@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_uniform_logits_give_n_log_v(block_size):
    def uniform(is_masked):
        return torch.full(is_masked.shape, -math.log(V))

    assert nelbo_exact(uniform, EVERYTHING, block_size) == pytest.approx(6 * math.log(V), rel=1e-6)
    assert nelbo_exact(uniform, PARTLY, block_size) == pytest.approx(4 * math.log(V), rel=1e-6)


def test_uniform_logits_give_n_log_v_from_any_single_sample():
    samples = nelbo_samples(lambda is_masked: torch.full(is_masked.shape, -math.log(V)), PARTLY, 50, seed=0)
    assert torch.allclose(samples, torch.full((50,), 4 * math.log(V), dtype=torch.float64), rtol=1e-6)


def test_unmasked_tokens_never_count_even_where_the_model_says_minus_infinity():
    def certain(is_masked):
        return torch.where(is_masked, -1.0, -torch.inf)

    assert nelbo_exact(certain, PARTLY) == pytest.approx(4)
    assert nelbo_samples(certain, PARTLY, 8, seed=0).isfinite().all()


@pytest.mark.parametrize("estimator", ["count", "level"])
def test_nothing_maskable_costs_nothing(estimator):
    nothing = torch.zeros(6, dtype=torch.bool)
    assert nelbo_exact(ToyConditional(), nothing) == 0
    assert nelbo_samples(ToyConditional(), nothing, 3, seed=0, estimator=estimator).tolist() == [0, 0, 0]


def test_every_pattern_masks_at_least_one_maskable_token_and_no_other():
    patterns = draw_patterns(PARTLY, 400, seed=1)
    counts = patterns.is_masked.sum(dim=1)
    assert not (patterns.is_masked & ~PARTLY).any()
    assert counts.bincount().tolist() == [0, 100, 100, 100, 100]
    assert torch.allclose(patterns.weight.double(), 4 / counts.double())


@pytest.mark.parametrize("num_samples", [1, 3, 8, 40])
def test_patterns_deal_out_every_token_before_any_comes_again(num_samples):
    unit_ids = torch.tensor([0, 1, 1, 0, -1, 2, 1, 1, 0, 1, 1])
    patterns = draw_unit_patterns(unit_ids, num_samples, seed=3, position=5)
    for unit in range(3):
        masks = patterns.is_masked[:, unit_ids == unit]
        dealt = torch.zeros(masks.shape[1], dtype=torch.int64)
        for mask in masks:
            if (dealt >= 1).all():
                dealt.zero_()
            dealt += mask
            assert dealt.max() - dealt.min() <= 1
        assert torch.equal(masks.sum(dim=1), patterns.num_masked[:, unit_ids == unit][:, 0])


def test_dealt_patterns_vary_less_than_sets_that_are_drawn_independently():
    model, exact = ToyConditional(), nelbo_exact(ToyConditional(), EVERYTHING)
    dealt = torch.stack([nelbo_samples(model, EVERYTHING, 6, seed=0, position=i).mean() for i in range(400)])
    counts = torch.arange(1, 7)  # one pattern with each number of masked tokens, as there
    keys = torch.rand(400, 6, 6, generator=torch.Generator().manual_seed(0)).argsort(dim=2)
    is_masked = (keys < counts[:, None]).flatten(0, 1)
    losses = -torch.where(is_masked, model(is_masked), 0).sum(dim=1).unflatten(0, (400, 6))
    independent = (losses * 6 / counts).mean(dim=1)
    assert (dealt - exact).square().mean() < 0.7 * (independent - exact).square().mean()


def test_a_row_too_long_to_enumerate_is_refused():
    with pytest.raises(ValueError, match="at most 20"):
        nelbo_exact(ToyConditional(), torch.ones(21, dtype=torch.bool))


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="accepted: count, level"):
        draw_patterns(EVERYTHING, 1, seed=0, estimator="stratified")
