"""Assembles a row from its steps, for the live view and recordings."""

from __future__ import annotations

from decausal.sampling.jobs import Ended, Progress
from decausal.sampling.rows import Row


class Followed:
    """A row that is updated by every step.

    Attributes:
        kept: The token of each position; None if it is open.
        step_of: The step in which a token was kept, by position, without given tokens.
        new: Positions that the last step kept.
        num_open: Positions that were open when the row began.
        length: Positions of the row; fewer once it has ended early.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self.kept: list[int | None] = list(row.ids(-1))
        for span in row.spans():
            self.kept[span.start : span.stop] = [None] * len(span)
        self.step_of: dict[int, int] = {}
        self.new: set[int] = set()
        self.num_open = sum(row.gaps)
        self.length = row.length

    @property
    def num_left(self) -> int:
        """Positions that are still open."""
        return self.kept[: self.length].count(None)

    def take(self, progress: Progress) -> None:
        """Takes in a step."""
        for position in progress.reopened:
            self.kept[position] = None
            self.step_of.pop(position, None)
        for position, token in zip(progress.positions, progress.ids, strict=True):
            self.kept[position], self.step_of[position] = token, progress.step
        self.new = set(progress.positions)
        if progress.ended is not None:
            self._end(progress.ended)

    def _end(self, ended: Ended) -> None:
        """Takes in a row's end. If it ends early, nothing after its end is shown, although positions there may have
        been kept."""
        if ended.reason != "length":
            self.length = self._row.spans()[0].start + len(ended.ids)
