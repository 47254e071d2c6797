"""Which shape is chosen: the best one under given acceptances and times, and never much slower than no drafts."""

from __future__ import annotations

import math
import random

import pytest

from decausal.sampling.blocks.draft_choice import Acceptances, DraftChoice, PassTimes
from decausal.sampling.blocks.draft_shapes import DraftShape, autoregressive, tokens_per_pass
from decausal.sampling.blocks.extent import Extent


def choice_of(longest: int = 8, reads_causally: bool = True, num_free: float = 16.0) -> DraftChoice:
    return DraftChoice(longest=longest, shift=1, reads_causally=reads_causally, head_share=0.25, num_free=num_free)


class Machine:
    """Passes over rows whose drafts are right by chance, and that take a given time."""

    def __init__(
        self, acceptances: list[float], num_free: float, num_rows: int, noise: float = 0.0, slowness: float = 1.0
    ) -> None:
        self.acceptances, self.num_free, self.num_rows, self.noise = acceptances, num_free, num_rows, noise
        self.slowness = slowness  # of passes with masks, beside what their work says
        self.random = random.Random(7)
        self.cold = 1.0
        self.widths: set[float] = set()
        self.pending = [0] * num_rows
        self.seconds = self.num_tokens = 0.0

    def seconds_of(self, extent: Extent) -> float:
        num_queries = extent.num_given + extent.num_drafts + extent.num_masks
        num_logits = extent.num_drafts + 1 + extent.num_new
        work = self.num_rows * (num_queries + 0.25 * num_logits) / 1.25
        first = self.cold if work not in self.widths else 1.0
        self.widths.add(work)
        first *= self.slowness if extent.num_masks else 1.0
        return first * (self.num_free + work) * math.exp(self.random.gauss(0, self.noise))

    def step(self, shape: DraftShape, choice: DraftChoice | None = None) -> None:
        pending = [min(each, shape.most_pending) for each in self.pending]
        verifies = shape.takes_turns and any(pending)
        drafts = [not (verifies and each == 0) for each in pending]
        extent = Extent(
            num_given=1,
            num_drafts=max(pending),
            num_masks=max(shape.num_masks(d) * now for d, now in zip(pending, drafts, strict=True)),
            num_new=max(max(shape.groups[d]) * now for d, now in zip(pending, drafts, strict=True)),
            num_keys=0,
        )
        num_right = [self._num_right(each) for each in pending]
        self.pending = [shape.groups[d][right] * now for d, right, now in zip(pending, num_right, drafts, strict=True)]
        seconds = self.seconds_of(extent)
        self.seconds += seconds
        self.num_tokens += sum(num_right) + self.num_rows
        if choice is not None:
            choice.note(self.num_rows, extent, seconds, zip(pending, num_right, strict=True))

    def _num_right(self, num_pending: int) -> int:
        for place in range(num_pending):
            if self.random.random() >= self.acceptances[place]:
                return place
        return num_pending

    def rate(self, choose: object, num_passes: int, choice: DraftChoice | None = None) -> float:
        """Tokens per second."""
        self.seconds = self.num_tokens = 0.0
        for _ in range(num_passes):
            self.step(choose(self.num_rows) if callable(choose) else choose, choice)
        return self.num_tokens / self.seconds


@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("num_free", [1.0, 16.0, 180.0])
@pytest.mark.parametrize("first", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("reads_causally", [True, False])
@pytest.mark.parametrize("slowness", [1.0, 1.5, 3.0])
def test_the_choice_is_never_much_slower_than_no_drafts(
    num_rows: int, num_free: float, first: float, reads_causally: bool, slowness: float
) -> None:
    acceptances = [max(first - 0.03 * place, 0.01) for place in range(8)]
    choice = choice_of(reads_causally=reads_causally)
    machine = Machine(acceptances, num_free, num_rows, 0.1, slowness)
    found = machine.rate(choice.shape, 600, choice)
    without = machine.rate(autoregressive(), 600)
    assert found >= 0.97 * without


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize(("first", "num_free"), [(0.9, 180.0), (0.7, 16.0), (0.05, 1.0)])
def test_the_choice_comes_close_to_the_best_shape(num_rows: int, first: float, num_free: float) -> None:
    acceptances = [max(first - 0.03 * place, 0.01) for place in range(8)]
    choice = choice_of(num_free=num_free)
    machine = Machine(acceptances, num_free, num_rows)
    machine.rate(choice.shape, 300, choice)
    found = machine.rate(choice.shape, 600, choice)
    candidates = [*choice._candidates(), autoregressive()]
    assert found >= 0.93 * max(machine.rate(shape, 300) for shape in candidates)


def test_passes_that_are_slow_once_do_not_decide() -> None:
    choice, machine = choice_of(4, reads_causally=False, num_free=40.0), Machine([0.7, 0.55, 0.5, 0.5], 16.0, 8)
    machine.cold = 4.0
    machine.rate(choice.shape, 40, choice)
    found = machine.rate(choice.shape, 200, choice)
    assert found >= 0.97 * machine.rate(autoregressive(), 200)


def test_it_gives_drafts_up_where_they_are_never_right_and_comes_back_when_they_are() -> None:
    choice, machine = choice_of(), Machine([0.0] * 8, 16.0, 1)
    machine.rate(choice.shape, 400, choice)
    assert choice._cases[1].chosen == autoregressive()
    machine.acceptances = [0.95] * 8
    machine.rate(choice.shape, 1500, choice)
    assert choice._cases[1].chosen.most_pending > 1


def test_acceptances_are_shares_of_the_drafts_whose_forerunners_are_right() -> None:
    acceptances, generator = Acceptances(3), random.Random(1)
    for _ in range(4000):
        right = [generator.random() < chance for chance in (0.9, 0.6, 0.3)]
        acceptances.note(3, next((place for place, each in enumerate(right) if not each), 3))
    assert acceptances.means() == pytest.approx([0.9, 0.6, 0.3], abs=0.06)


def test_times_between_those_measured_follow_the_device_and_meet_them() -> None:
    times = PassTimes(16.0)
    for _ in range(3):
        times.note(1.0, 0.034)
        times.note(64.0, 0.4)
    assert times.seconds(1.0) == pytest.approx(0.034)
    assert times.seconds(64.0) == pytest.approx(0.4)
    assert 0.034 < times.seconds(8.0) < times.seconds(16.0) < 0.4
    assert times.seconds(128.0) > 0.4


def test_times_beyond_those_measured_follow_what_these_say_of_the_device() -> None:
    times = PassTimes(16.0)
    for work in (1.0, 2.0, 8.0):
        for _ in range(5):
            times.note(work, 0.001 * (128 + work))
    before = times.seconds(64.0)
    times.fit()
    assert times.seconds(64.0) == pytest.approx(0.192, rel=0.02)
    assert before > 1.5 * 0.192


def test_tokens_per_second_are_those_per_pass_over_the_time() -> None:
    choice = choice_of()
    shape = autoregressive()
    assert choice.tokens_per_second(shape, 1) == pytest.approx(tokens_per_pass(shape, []) / choice._times.seconds(1.0))
