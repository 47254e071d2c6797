"""When the aligned run reaches the plain run's best, on histories written by hand."""

from __future__ import annotations

import pytest

from decausal.demo.history import Measurement, best, crossing


def history(*values: float, seconds_per_step: float = 0.5) -> list[Measurement]:
    """Measurements every 10 steps."""
    return [
        Measurement(10 * index, 10 * index * seconds_per_step, value, value + 1, None)
        for index, value in enumerate(values)
    ]


PLAIN = history(9.0, 7.0, 6.0, 6.5)


def test_the_best_is_the_first_of_the_lowest() -> None:
    assert best(history(5.0, 3.0, 4.0, 3.0), "masked_cross_entropy").step == 10


def test_a_run_that_meets_the_best_at_a_measurement_has_reached_it_there() -> None:
    found = crossing(PLAIN, history(9.0, 6.0, 5.0, seconds_per_step=0.7), "masked_cross_entropy")
    assert (found.plain_best, found.plain_step, found.plain_seconds) == (6.0, 20, 10.0)
    assert (found.aligned_step, found.aligned_seconds) == (10, 7.0)
    assert (found.between_step, found.between_seconds) == (10, 7.0)
    assert (found.aligned_best, found.aligned_best_step) == (5.0, 20)


def test_a_run_that_passes_the_best_between_measurements_has_reached_it_by_the_later() -> None:
    found = crossing(PLAIN, history(9.0, 6.5, 5.5, seconds_per_step=1.0), "masked_cross_entropy")
    assert (found.aligned_step, found.aligned_seconds) == (20, 20.0)
    assert found.between_step == pytest.approx(15.0)
    assert found.between_seconds == pytest.approx(15.0)


def test_a_run_that_never_gets_there_has_not_crossed_and_the_sentence_says_so() -> None:
    found = crossing(PLAIN, history(9.0, 8.0, 6.1), "masked_cross_entropy")
    assert found.aligned_step is None
    assert found.aligned_seconds is None
    assert found.between_step is None
    assert "did not reach it: its own best was 6.100 nats, at step 20" in found.sentence()


def test_what_counts_is_the_best_value_not_the_last() -> None:
    overfitted = history(9.0, 6.0, 8.0)
    found = crossing(overfitted, history(9.0, 7.0, 6.5), "masked_cross_entropy")
    assert found.plain_best == 6.0
    assert found.aligned_step is None


def test_a_value_that_is_left_again_counts_as_reached() -> None:
    assert crossing(PLAIN, history(9.0, 5.9, 8.0), "masked_cross_entropy").aligned_step == 10


def test_each_measure_has_its_own_crossing() -> None:
    found = crossing(PLAIN, history(9.0, 6.0), "nelbo_per_token")
    assert found.plain_best == 7.0
    assert found.aligned_step == 10


def test_the_sentence_compares_steps_and_time() -> None:
    found = crossing(PLAIN, history(9.0, 5.0, seconds_per_step=0.75), "masked_cross_entropy")
    assert "at step 20 (10.0 s of training)" in found.sentence()
    assert "by step 10 (7.5 s): 0.50 times the steps, 0.75 times the time" in found.sentence()


def test_the_start_is_nobodys_best_but_the_sentence_says_where_training_came_to_nothing() -> None:
    found = crossing(history(5.0, 7.0, 6.0), history(5.0, 5.5, 5.6), "masked_cross_entropy")
    assert (found.plain_best, found.plain_step) == (6.0, 20)
    assert (found.aligned_step, found.between_step) == (10, 10)
    assert "no better than the 5.000 that both began with" in found.sentence()
    assert "began with" not in crossing(PLAIN, PLAIN, "masked_cross_entropy").sentence()
