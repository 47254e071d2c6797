"""Gaps of unknown length in an engine. The search's rows run like any others, and its answer ends as one row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from decausal.models.checkpoint import Converted
from decausal.sampling.filling.lengths import SCORING_GROUPS, GappedText, LengthSearch
from decausal.sampling.jobs import Engine, Job, Progress
from decausal.sampling.rows import Row
from decausal.sampling.scoring import TokenScores, score_tokens


@dataclass(frozen=True, kw_only=True)
class SearchJob(Job):
    """A job with gaps of unknown length. Its `row` has the longest possible gaps.

    Attributes:
        text: The given ids and the known lengths.
        longest: The most tokens of a gap of unknown length.
        length_search: "candidates" or "grow".
    """

    text: GappedText
    longest: int
    length_search: str = "candidates"

    def with_row(self, row: Row) -> Job:
        """Returns the same job for a row whose lengths are known."""
        return Job(row, self.settings, self.seed, self.end_token_ids, self.is_watched, self.num_top_log_probs)

    def candidate(self, row: Row) -> Job:
        """Returns the job that fills a row for scoring: to its full length and unwatched."""
        return Job(row, replace(self.settings, stop=(), stop_token_ids=()), self.seed)


@dataclass
class _Searching:
    job: SearchJob
    search: LengthSearch
    scored: dict[int, tuple[list[int], int, TokenScores]] = field(default_factory=dict)  # by index of a row


class _Place(NamedTuple):
    """One of the rows that a search asked for."""

    ticket: int
    index: int


class _Candidate(NamedTuple):
    """A filled row that waits for its score."""

    place: _Place
    ids: list[int]
    num_forwards: int


class SearchingEngine:
    """An engine that also takes `SearchJob`s. It fills candidates, scores them, and then writes the best row.

    Candidates take at most half of the engine's places, so that other rows continue. A step scores at most as many of
    them as fit into one batch. The result is that of `fill` for the same text and seed. Steps are reported once the
    lengths are known.

    Args:
        engine: The engine that fills rows, for a bidirectional model.
        converted: The engine's model.
        max_rows: The engine's places.
    """

    def __init__(self, engine: Engine, converted: Converted, max_rows: int) -> None:
        self._engine, self._converted = engine, converted
        self._most_candidates = max(1, max_rows // 2)
        self._scored_at_once = max(1, max_rows // SCORING_GROUPS)
        self._num_searches = 0
        self._searching: dict[int, _Searching] = {}  # by ticket, below 0; the engine's own tickets are not negative
        self._waiting: deque[_Place] = deque()
        self._trying: dict[int, _Place] = {}  # by the engine's ticket
        self._unscored: deque[_Candidate] = deque()
        self._settled: dict[int, int] = {}  # the search's ticket by the engine's ticket, once lengths are known

    @property
    def num_running(self) -> int:
        """Rows that the next step reads."""
        return self._engine.num_running + len(self._unscored)

    @property
    def num_waiting(self) -> int:
        """Rows that wait for a place."""
        return self._engine.num_waiting + len(self._waiting)

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket.

        Raises:
            UserError: As the engine's. A search is refused if its longest row would be.
        """
        if not isinstance(job, SearchJob):
            return self._engine.submit(job)
        self._engine.cancel(self._engine.submit(job.with_row(job.row)))
        self._num_searches += 1
        search = LengthSearch(job.text, job.longest, self._converted.facts.shift, job.length_search)
        self._searching[-self._num_searches] = _Searching(job, search)
        self._ask(-self._num_searches)
        return -self._num_searches

    def cancel(self, ticket: int) -> None:
        """Drops a row and its search."""
        inner = [own for own, place in self._trying.items() if place.ticket == ticket]
        inner += [own for own, search in self._settled.items() if search == ticket]
        for own in inner if ticket < 0 else [ticket]:
            self._engine.cancel(own)
        self._searching.pop(ticket, None)
        self._waiting = deque(place for place in self._waiting if place.ticket != ticket)
        self._unscored = deque(each for each in self._unscored if each.place.ticket != ticket)
        self._trying = {own: place for own, place in self._trying.items() if place.ticket != ticket}
        self._settled = {own: search for own, search in self._settled.items() if search != ticket}

    def step(self) -> list[Progress]:
        """Takes all rows one step further, scores filled candidates, and reports on all rows except candidates."""
        while self._waiting and len(self._trying) < self._most_candidates:
            place = self._waiting.popleft()
            searching = self._searching[place.ticket]
            own = self._engine.submit(searching.job.candidate(searching.search.asked[place.index]))
            self._trying[own] = place
        progresses = [each for progress in self._engine.step() for each in self._for_callers(progress)]
        if self._unscored:
            self._score()
        return progresses

    def _ask(self, ticket: int) -> None:
        asked = self._searching[ticket].search.asked
        self._waiting.extend(_Place(ticket, index) for index in range(len(asked)))

    def _for_callers(self, progress: Progress) -> Iterator[Progress]:
        if progress.ticket in self._settled:
            yield self._of_search(progress)
        elif progress.ticket not in self._trying:
            yield progress
        elif progress.ended is not None:
            place = self._trying.pop(progress.ticket)
            row = self._searching[place.ticket].search.asked[place.index]
            self._unscored.append(_Candidate(place, row.filled(progress.ended.ids), progress.ended.num_forwards))

    def _of_search(self, progress: Progress) -> Progress:
        ticket = self._settled[progress.ticket]
        job, found = self._searching[ticket].job, self._searching[ticket].search.found
        row = job.text.row(found.lengths) if progress.step == 0 else None
        ended = progress.ended
        if ended is not None:
            ended = replace(ended, num_forwards=ended.num_forwards + found.num_forwards)
            del self._settled[progress.ticket], self._searching[ticket]
        return replace(progress, ticket=ticket, row=row, ended=ended)

    def _score(self) -> None:
        candidates = [self._unscored.popleft() for _ in range(min(self._scored_at_once, len(self._unscored)))]
        positions = [
            self._searching[each.place.ticket].search.scored_positions(each.place.index) for each in candidates
        ]
        ids = [each.ids for each in candidates]
        scores = score_tokens(
            self._converted, ids, positions, groups=SCORING_GROUPS, batch_size=SCORING_GROUPS * self._scored_at_once
        )
        for each, found in zip(candidates, scores, strict=True):
            self._searching[each.place.ticket].scored[each.place.index] = (each.ids, each.num_forwards, found)
        for ticket in dict.fromkeys(each.place.ticket for each in candidates):
            self._settle(ticket)

    def _settle(self, ticket: int) -> None:
        """Continues a search once all rows that it asked for are scored."""
        searching = self._searching[ticket]
        search = searching.search
        if len(searching.scored) < len(search.asked):
            return
        results = [searching.scored[index] for index in range(len(search.asked))]
        searching.scored.clear()
        search.take(*zip(*results, strict=True))
        self._ask(ticket)
        if not search.asked:
            own = self._engine.submit(searching.job.with_row(searching.job.text.row(search.found.lengths)))
            self._settled[own] = ticket
