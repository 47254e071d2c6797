"""Chooses the fastest draft shape from measured acceptances and the measured times of passes.

Texts do not depend on the choice, so it may change with every pass. A shape is rated by its tokens per second: tokens
per pass, which follow from the acceptances, divided by the seconds of a pass. Seconds are measured, and interpolated or
expected for other amounts of work. Passes without drafts are timed too, so that drafting stops if it does not pay off.
It is then tried again. How often is bounded by an account of the time that drafts have cost, however wrong expectations
are.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from torch import nn

from decausal.devices import choices
from decausal.models.backbone import head_of, stock_model
from decausal.sampling.blocks.draft_shapes import (
    DraftShape,
    autoregressive,
    linear,
    quadratic,
    ragged,
    shares_of_pending,
    strided,
    tokens_per_pass,
)
from decausal.sampling.blocks.draft_tables import Drafting
from decausal.sampling.blocks.extent import Extent

_EXPECTED, _WEIGHT = 0.5, 4.0
"""The assumed acceptance before any measurement, and the number of drafts for which it counts."""
_MEMORY = 0.998
"""The share of a measured acceptance's weight that stays with every further draft: about the last 500 count."""
_TIMES = 15
"""Passes of one width whose median counts."""
_ENOUGH = 3
"""Passes of a width whose median says something."""
_FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 8.0)
"""What the device's free queries are multiplied by, the likeliest first."""
_GAIN = 1.04
"""Drafting has to be faster by this factor than writing without drafts."""
_TRIALS = 0.01
"""The share of time for trying what seems slower."""
_CREDIT = 3.0
"""What drafts may cost before this share has grown to it, in passes without drafts."""
_PAUSE = 16
"""The fewest passes between trials of drafts."""
_PASSES = 64
"""The choice is made again after this many passes."""
_FIRST = (2, 4, 8, 16, 32)
"""It is also made again after these first passes."""
_THINKING = 0.01
"""The share of the time that choosing may take."""
_EARLY = 16
"""Passes between trials without drafts, until enough of them are timed."""
_GLANCE = 8
"""After this many passes it is checked whether the choice pays off."""
_RARE = 1e-6
"""States of rows that are ignored because they are rare."""
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_BUDGETS = (6, 12, 22, 40)
"""Queries of ragged shapes."""
_MOST_QUERIES = 256
"""The most queries of a row in any shape, since a cache holds them for every row."""


class Acceptances:
    """The shares of i-th drafts that are right if those before them are."""

    def __init__(self, length: int) -> None:
        self._asked, self._right = [0.0] * length, [0.0] * length

    def note(self, num_pending: int, num_right: int) -> None:
        """Takes in a row of a pass."""
        for place in range(min(num_pending, num_right + 1, len(self._asked))):
            self._asked[place] = _MEMORY * self._asked[place] + 1
            self._right[place] = _MEMORY * self._right[place] + (place < num_right)

    def means(self, expected: Sequence[float] | None = None) -> list[float]:
        """Returns the measured acceptances as far as they exist. Later drafts are assumed to be no better than earlier
        ones.

        Args:
            expected: The assumption before measurements.
        """
        found: list[float] = []
        for place, (asked, right) in enumerate(zip(self._asked, self._right, strict=True)):
            expected_here = _EXPECTED if expected is None else expected[place]
            expected_here = min([expected_here, *found[-1:]])
            found.append((right + _WEIGHT * expected_here) / (asked + _WEIGHT))
        return found


class PassTimes:
    """The seconds of a pass by its work, in queries.

    A pass is expected to take time in proportion to its work and a number of free queries together.

    Args:
        num_free: The assumed number of free queries until passes with different amounts of work are timed.
    """

    def __init__(self, num_free: float) -> None:
        self._device_free = self._num_free = num_free
        self._last: dict[int, deque[float]] = {}
        self._medians: dict[int, tuple[float, float]] = {}
        self._slowness: dict[int, float] = {}

    def note(self, work: float, seconds: float) -> None:
        """Takes in one pass. The first pass of each amount of work only counts until there is another, since it may
        have to allocate memory."""
        bucket = _bucket(work)
        if bucket not in self._last:
            self._last[bucket] = deque(maxlen=_TIMES)
        else:
            self._last[bucket].append(seconds)
        self._medians[bucket] = work, median(self._last[bucket] or [seconds])
        self._slowness[bucket] = self._slowness_of(bucket, self._num_free)

    def fit(self) -> None:
        """Chooses the number of free queries that best explains the times of passes, among a few around the device's
        number."""
        known = [bucket for bucket, times in self._last.items() if len(times) >= _ENOUGH]
        if len(known) < 2:
            return

        def spread(num_free: float) -> float:
            found = [self._slowness_of(bucket, num_free) for bucket in known]
            return max(found) / min(found)

        self._num_free = min((self._device_free * factor for factor in _FACTORS), key=spread)
        self._slowness = {bucket: self._slowness_of(bucket, self._num_free) for bucket in self._medians}

    def num_known(self, work: float) -> int:
        """Returns how many passes of about as much work count, at most `_TIMES`."""
        return len(self._last.get(_bucket(work), ()))

    def seconds(self, work: float) -> float:
        """Returns the seconds of a pass. Before any pass was timed, the unit is arbitrary."""
        return (self._num_free + work) * self._slowness_at(2 * math.log2(work))

    def _slowness_of(self, bucket: int, num_free: float) -> float:
        work, seconds = self._medians[bucket]
        return seconds / (num_free + work)

    def _slowness_at(self, place: float) -> float:
        """Interpolates between the measured works on both sides."""
        below = max((bucket for bucket in self._slowness if bucket <= place), default=None)
        above = min((bucket for bucket in self._slowness if bucket > place), default=None)
        if below is None or above is None:
            nearest = above if below is None else below
            return 1.0 if nearest is None else self._slowness[nearest]
        share = (place - below) / (above - below)
        return (1 - share) * self._slowness[below] + share * self._slowness[above]


def _bucket(work: float) -> int:
    """Returns the class of an amount of work, two for each doubling."""
    return round(2 * math.log2(work))


@dataclass
class _Case:
    """The choice for a number of rows.

    Attributes:
        chosen: The shape that seems fastest.
        num_passes: Passes so far.
        trial: The shape that is used instead for the next `num_trials` passes.
        next_trial: The pass before which other shapes are tried again.
    """

    chosen: DraftShape = field(default_factory=autoregressive)
    num_passes: int = 0
    trial: DraftShape = field(default_factory=autoregressive)
    num_trials: int = 0
    next_trial: float = 0.0


class DraftChoice:
    """The measurements of a model's drafts and passes on this device.

    Args:
        longest: The most tokens drafted at once, at least 1.
        shift: The model's shift.
        reads_causally: Whether masks of a group do not read later ones. Then the first drafts of a group equal those of
            a shorter one, groups of any lengths can be mixed, and all share their acceptances.
        head_share: The work of a token's logits, relative to a query's.
        num_free: See `PassTimes`.
        by_masks: See `Drafting`.
    """

    def __init__(
        self,
        *,
        longest: int,
        shift: int,
        reads_causally: bool,
        head_share: float,
        num_free: float,
        by_masks: bool = False,
    ) -> None:
        self._longest, self._shift, self._reads_causally = longest, shift, reads_causally
        self._head_share, self._by_masks = head_share, by_masks
        self._times = PassTimes(num_free)
        self._acceptances = Acceptances(longest)
        self._by_length: dict[int, Acceptances] = {}
        self._cases: dict[int, _Case] = {}
        self._seconds_thinking = self._seconds_passing = self._seconds_lost = 0.0

    @classmethod
    def of(cls, model: nn.Module, *, longest: int, shift: int, reads_causally: bool, by_masks: bool) -> DraftChoice:
        """Returns the choice of a model, which successive engines of that model share."""
        stock = stock_model(model)
        by_kind = _CHOICES.setdefault(stock, {})
        kind = (longest, shift, reads_causally, by_masks, stock.dtype)
        if kind not in by_kind:
            head = head_of(model).weight.numel()
            body = sum(weight.numel() for weight in stock.base_model.parameters())
            body -= stock.get_input_embeddings().weight.numel()
            by_kind[kind] = cls(
                longest=longest,
                shift=shift,
                reads_causally=reads_causally,
                by_masks=by_masks,
                head_share=head / max(body, 1),
                num_free=choices(stock.device).free_queries,
            )
        return by_kind[kind]

    def shape(self, num_rows: int) -> DraftShape:
        """Returns the shape for the next pass over a number of rows."""
        case = self._cases.setdefault(num_rows, _Case())
        may_draft = self._may_draft(num_rows)
        if case.trial.most_pending and not may_draft:
            case.num_trials = 0
        if not case.num_trials:
            if self._disappoints(case, num_rows) or not may_draft:
                case.chosen = autoregressive()
            elif (case.num_passes % _PASSES == 0 or case.num_passes in _FIRST) and self._may_think():
                start = time.perf_counter()
                case.chosen = self._best(num_rows)
                self._seconds_thinking += time.perf_counter() - start
            if case.num_passes >= case.next_trial:
                self._begin_trial(case, num_rows)
        return case.trial if case.num_trials else case.chosen

    def note(self, num_rows: int, extent: Extent, seconds: float, outcomes: Iterable[tuple[int, int]]) -> None:
        """Takes in a pass over rows for which this made the choice.

        Args:
            num_rows: Rows of the pass.
            extent: How much it read of each row.
            seconds: Its time.
            outcomes: For each row, the number of pending drafts, and how many of them were right.
        """
        num_queries = extent.num_given + extent.num_drafts + extent.num_masks
        work = self._work(num_rows, num_queries, extent.num_drafts + 1 + extent.num_new)
        self._times.note(work, seconds)
        self._seconds_passing += seconds
        outcomes = list(outcomes)
        if extent.num_drafts or extent.num_masks:
            num_tokens = 1 + sum(num_right for _, num_right in outcomes) / max(len(outcomes), 1)
            self._seconds_lost = max(0.0, self._seconds_lost + seconds - num_tokens * self._seconds_without(num_rows))
        for num_pending, num_right in outcomes:
            if num_pending:
                self._acceptances.note(num_pending, num_right)
                self._by_length.setdefault(num_pending, Acceptances(self._longest)).note(num_pending, num_right)
        case = self._cases.setdefault(num_rows, _Case())
        case.num_passes += 1
        case.num_trials = max(0, case.num_trials - 1)

    def _work(self, num_rows: int, num_queries: int, num_logits: int) -> float:
        """Returns the work of a pass per row, reading and predicting, in queries."""
        return num_rows * (num_queries + self._head_share * num_logits) / (1 + self._head_share)

    def tokens_per_second(self, shape: DraftShape, num_rows: int) -> float:
        """Returns the expected result of a shape for each of a number of rows."""
        acceptances = self._means(shape.longest_group)
        shares = shares_of_pending(shape, acceptances)
        works = [(share, self._work_of(shape, num_rows, d)) for d, share in enumerate(shares) if share > _RARE]
        if num_rows == 1 or shape.takes_turns:
            seconds = sum(share * self._times.seconds(work) for share, work in works)
        else:  # rows in different states all need the space of the widest
            seconds = self._times.seconds(max(work for _, work in works))
        return tokens_per_pass(shape, acceptances, shares) / seconds

    def _work_of(self, shape: DraftShape, num_rows: int, num_pending: int) -> float:
        num_masks = Drafting(shape, self._by_masks).num_masks(num_pending, self._shift)
        num_logits = 1 + num_pending + max(shape.groups[num_pending])
        return self._work(num_rows, 1 + num_pending + num_masks, num_logits)

    def _means(self, length: int) -> list[float]:
        """Returns the acceptances of groups of a length. If lengths do not share them, shorter ones give the
        assumption."""
        of_all = self._acceptances.means()
        if self._reads_causally or length not in self._by_length:
            return of_all
        return self._by_length[length].means(of_all)

    def _candidates(self) -> list[DraftShape]:
        lengths = [length for length in _LENGTHS if length < self._longest] + [self._longest]
        found = [make(length) for length in lengths for make in (quadratic, strided, linear)]
        if self._reads_causally:
            means = self._means(self._longest)
            found += [ragged(means, budget, self._shift) for budget in _BUDGETS]
        return [
            shape
            for shape in found
            if shape.most_pending and shape.num_queries(shape.most_pending, self._shift) <= _MOST_QUERIES
        ]

    def _may_think(self) -> bool:
        """Returns whether choosing takes little time compared with passes. For small models it does not."""
        return self._seconds_thinking <= _THINKING * self._seconds_passing

    def _may_draft(self, num_rows: int) -> bool:
        """Returns whether drafts have not cost more time than they may. What they gained before does not count, so that
        it is noticed soon when they get worse."""
        credit = _CREDIT * self._seconds_without(num_rows)
        return self._seconds_lost <= credit + _TRIALS * self._seconds_passing

    def _seconds_without(self, num_rows: int) -> float:
        """Returns the time of a pass without drafts."""
        return self._times.seconds(self._work_of(autoregressive(), num_rows, 0))

    def _disappoints(self, case: _Case, num_rows: int) -> bool:
        """Returns whether the choice turns out not to pay off. This is checked more often than which shape is best."""
        if case.num_passes % _GLANCE or not case.chosen.most_pending:
            return False
        return self._gain(case.chosen, num_rows) < _GAIN

    def _gain(self, shape: DraftShape, num_rows: int) -> float:
        """Returns a shape's speed relative to that without drafts."""
        return self.tokens_per_second(shape, num_rows) / self.tokens_per_second(autoregressive(), num_rows)

    def _best(self, num_rows: int) -> DraftShape:
        self._times.fit()
        drafting = self._best_that_drafts(num_rows)
        return drafting if self._gain(drafting, num_rows) > _GAIN else autoregressive()

    def _best_that_drafts(self, num_rows: int) -> DraftShape:
        return max(self._candidates(), key=lambda shape: self.tokens_per_second(shape, num_rows))

    def _begin_trial(self, case: _Case, num_rows: int) -> None:
        """Starts a few passes without drafts if some are chosen, or with the best shape if none are.

        The more those without drafts cost, the later the next ones come. Drafts are tried whenever their account
        allows. In the beginning, only what was never timed is tried.
        """
        if case.chosen.most_pending:
            self._try_without(case, num_rows)
        elif self._may_draft(num_rows):
            case.trial = self._best_that_drafts(num_rows)
            case.num_trials = 3 if case.num_passes else 0
            case.next_trial = case.num_passes + _PAUSE

    def _try_without(self, case: _Case, num_rows: int) -> None:
        case.trial, num_trials = autoregressive(), 4
        num_known = self._times.num_known(self._work_of(case.trial, num_rows, 0))
        if case.num_passes or not num_known:
            case.num_trials = num_trials
        usual = self._times.seconds(self._work_of(case.chosen, num_rows, case.chosen.most_pending))
        share = max(1 - 1 / self._gain(case.chosen, num_rows), 0.1)
        lost = num_trials * share * self._seconds_without(num_rows) / usual
        # No other number matters as much as the time of passes without drafts.
        wait = lost / _TRIALS if num_known >= _TIMES else min(lost / _TRIALS, _EARLY)
        case.next_trial = case.num_passes + num_trials + wait


_CHOICES: weakref.WeakKeyDictionary[nn.Module, dict[tuple, DraftChoice]] = weakref.WeakKeyDictionary()
