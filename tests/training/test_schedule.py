"""How the alignment's weight moves."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decausal.training.schedule import WeightSchedule, steps

shapes = st.sampled_from(["constant", "linear", "cosine"])


@given(st.floats(0.1, 100), shapes, st.one_of(st.none(), st.integers(0, 50)), st.integers(1, 50))
def test_it_starts_at_the_weight_never_rises_and_is_0_from_the_stop_on(weight, shape, stop_step, num_steps):
    schedule = WeightSchedule(weight, shape, stop_step, num_steps)
    values = [schedule(step) for step in range(60 if stop_step is not None else num_steps)]
    assert values[0] == (0.0 if stop_step == 0 else weight)
    assert all(later <= earlier for earlier, later in pairwise(values))
    if stop_step is not None:
        assert not any(values[stop_step:])
        assert [schedule.is_over(step) for step in range(60)] == [step >= stop_step for step in range(60)]


def test_half_way_each_shape_is_where_it_should_be():
    assert [WeightSchedule(8.0, shape, None, 10)(5) for shape in ("constant", "linear", "cosine")] == pytest.approx(
        [8, 4, 4]
    )
    assert WeightSchedule(8.0, "cosine", None, 12)(3) == pytest.approx(4 * (1 + 0.5**0.5))
    assert WeightSchedule(8.0, "linear", 4, 100)(2) == 4


@given(shapes, st.integers(0, 20), st.integers(1, 20))
def test_a_late_start_moves_the_schedule_and_changes_nothing_else(shape, start_step, length):
    late = WeightSchedule(3.0, shape, None, start_step + length, start_step)
    prompt = WeightSchedule(3.0, shape, None, length)
    assert not any(late(step) for step in range(start_step))
    assert [late(start_step + step) for step in range(length)] == [prompt(step) for step in range(length)]
    assert not late.is_over(0)


def test_steps_are_counts_or_shares_of_the_run():
    assert [steps(count, 50) for count in (None, 0, 0.5, 1, 7, 7.0)] == [None, 0, 25, 1, 7, 7]


def test_a_weight_of_0_is_over_from_the_start():
    assert WeightSchedule(0.0, "constant", None, 10).is_over(0)
