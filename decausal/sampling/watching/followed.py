"""One row as it is written, put together from its steps: what both the live view and recordings draw."""

from __future__ import annotations

from decausal.sampling.jobs import Ended, Progress
from decausal.sampling.rows import Row


class Followed:
    """A row of which every step is taken in.

    Attributes:
        kept: For each position its token; None where it is open.
        step_of: By position, the step in which a token was kept; given ones are not in it.
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
        """Takes a step in."""
        for position in progress.reopened:
            self.kept[position] = None
            self.step_of.pop(position, None)
        for position, token in zip(progress.positions, progress.ids, strict=True):
            self.kept[position], self.step_of[position] = token, progress.step
        self.new = set(progress.positions)
        if progress.ended is not None:
            self._end(progress.ended)

    def _end(self, ended: Ended) -> None:
        """A row that ends early has nothing after its end, though positions there may have been kept."""
        if ended.reason != "length":
            self.length = self._row.spans()[0].start + len(ended.ids)
