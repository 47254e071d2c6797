"""Crossings, losses and means, on curves whose answers are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decausal.compare.findings import Curve, milestones, parallel_losses, reaching
from decausal.compare.records import Measurement, Score
from decausal.compare.training import RunResult
from decausal.training.meters import TokenCounts


def result(arm: str, seed: int, curve: list[tuple[int, float]], final: dict[float, str] | None = None) -> RunResult:
    """A run measured statically at the given (clean tokens, quality), and at its end on prompts answered "1" or "0"."""
    measurements = [
        Measurement(tokens, tokens / 1000, 0.0, TokenCounts(clean=tokens), (Score(1.0, quality),))
        for tokens, quality in curve
    ]
    scores = [
        Score(threshold, right.count("1") / len(right), right=right, tokens_per_forward=1 / threshold)
        for threshold, right in (final or {}).items()
    ]
    return RunResult(arm, seed, "somewhere", measurements, scores)


RISING = [(0, 0.0), (100, 0.2), (200, 0.6), (400, 0.5)]


def test_the_arms_tokens_are_where_its_line_meets_the_references_best() -> None:
    results = [
        result("corpus", 0, RISING),
        result("policy", 0, [(0, 0.0), (50, 0.4), (100, 0.8)]),
        result("corpus", 1, RISING),
        result("policy", 1, [(0, 0.0), (400, 0.6)]),
    ]
    (found,) = reaching(results, "corpus", 1.0, "clean", higher_is_better=True)
    assert found.reference_tokens == (200, 200)
    assert found.arm_tokens == pytest.approx((75, 400))
    assert found.mean_ratio == pytest.approx(math.sqrt(75 / 200 * 400 / 200))
    assert f"{found.mean_ratio:.2f} times the tokens" in found.sentence("accuracy")


def test_an_arm_that_never_gets_there_has_no_ratio_and_the_sentence_says_so() -> None:
    results = [result("corpus", 0, RISING), result("policy", 0, [(0, 0.0), (400, 0.59)])]
    (found,) = reaching(results, "corpus", 1.0, "clean", higher_is_better=True)
    assert found.arm_tokens == (None,)
    assert found.mean_ratio is None
    assert "did not reach it" in found.sentence("accuracy")


def test_with_some_seeds_only_the_ratio_is_not_averaged_over_those_that_succeeded() -> None:
    results = [result("corpus", seed, RISING) for seed in (0, 1)]
    results += [result("policy", 0, [(0, 0.0), (100, 0.7)]), result("policy", 1, [(0, 0.0), (100, 0.1)])]
    (found,) = reaching(results, "corpus", 1.0, "clean", higher_is_better=True)
    assert found.mean_ratio is None
    assert "1 of 2 seeds" in found.sentence("accuracy")


def test_a_reference_that_learnt_nothing_sets_no_target() -> None:
    results = [result("corpus", 0, [(0, 0.0), (100, 0.0)]), result("policy", 0, RISING)]
    (found,) = reaching(results, "corpus", 1.0, "clean", higher_is_better=True)
    assert "nothing for policy to reach" in found.sentence("accuracy")


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(-5, 5)), min_size=1, max_size=8),
    st.floats(-5, 5),
)
def test_a_falling_measure_crosses_where_its_mirror_image_does(steps: list[tuple[int, float]], target: float) -> None:
    tokens, quality = [0.0], [0.0]
    for step, value in steps:
        tokens.append(tokens[-1] + step)
        quality.append(value)
    rising, falling = Curve(tuple(tokens), tuple(quality)), Curve(tuple(tokens), tuple(-value for value in quality))
    crossed = rising.tokens_to(target, higher_is_better=True)
    assert crossed == falling.tokens_to(-target, higher_is_better=False)
    best, when = rising.best(higher_is_better=True)
    assert falling.best(higher_is_better=False) == (-best, when)
    assert (crossed is None) == (best < target)
    assert crossed is None or crossed <= when or best > target


def test_milestones_are_shares_of_the_ar_models_accuracy() -> None:
    found = milestones([result("policy", 0, RISING)], Score(1.0, 0.8), 1.0, "clean", shares=(0.5, 0.97))
    assert [milestone.tokens for milestone in found] == [(150.0,), (None,)]


def test_what_parallel_decoding_loses_is_taken_prompt_by_prompt() -> None:
    results = [
        result("policy", 0, RISING, {1.0: "1110", 0.9: "1100", 0.5: "1110"}),
        result("policy", 1, RISING, {1.0: "1111", 0.9: "0111", 0.5: "1111"}),
    ]
    nine, five = parallel_losses(results)
    assert nine.threshold == 0.9
    assert nine.lost.values == (0.25, 0.25)
    # by prompt, over both seeds: 1/2, 0, 1/2, 0
    assert nine.standard_error == pytest.approx(math.sqrt(4 * 0.25**2 / 3) / 2)
    assert nine.tokens_per_forward == pytest.approx(1 / 0.9)
    assert five.lost.mean == five.standard_error == 0
