"""The places of the groups of masks that train drafts. There are no tensors here, since settings are read before torch
is imported."""

from __future__ import annotations

from dataclasses import dataclass

from decausal.errors import UserError

GRID, ALL = "grid", "all"


@dataclass(frozen=True)
class Grouping:
    """The places and lengths of groups.

    Attributes:
        lengths: Masks of a group, m, in equal shares of the run: (1, 2, 3) grows twice.
        anchors: "grid": groups one after another, so that every token is drafted once. "all": one after every token. A
            number: that many, after random tokens of each row.
    """

    lengths: tuple[int, ...]
    anchors: str | int = GRID

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"groups have lengths {self.lengths}; each must be at least 1")
        is_number = isinstance(self.anchors, int) and self.anchors >= 1
        if self.anchors not in (GRID, ALL) and not is_number:
            raise UserError(f"anchors is {self.anchors!r}; accepted: {GRID}, {ALL} or a number of at least 1")

    def length_at(self, position: int, num_rows: int) -> int:
        """Returns the masks of a group in the row at a position of a run of `num_rows` rows."""
        share = min(position * len(self.lengths) // max(num_rows, 1), len(self.lengths) - 1)
        return self.lengths[share]
