"""Draft shapes as tensors: where each mask of a row stands, by the row's shape and its number of pending drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.sampling.blocks.draft_shapes import DraftShape, autoregressive


@dataclass(frozen=True)
class Masks:
    """The masks of some rows.

    Attributes:
        is_real: The others fill up.
        behind: Drafts that each one's group stands behind.
        offset: Its place in its group.
        first, stop: Masks that it reads, its own group's.
        start: Of each number of right drafts, the first mask that drafts.
        length: Of each number of right drafts, how many tokens are drafted.
    """

    is_real: Bool[Tensor, "b s"]
    behind: Int[Tensor, "b s"]
    offset: Int[Tensor, "b s"]
    first: Int[Tensor, "b s"]
    stop: Int[Tensor, "b s"]
    start: Int[Tensor, "b j"]
    length: Int[Tensor, "b j"]


class DraftTables:
    """The masks of several shapes, made once for each set of them.

    Args:
        shapes: Which rows name by their index; one more, without drafts, stands behind them.
        shift: The model's.
        reads_causally: Masks of a group do not read those behind them.
        device: Where passes run.

    Attributes:
        without_drafts: The index of the shape that drafts nothing.
        most_pending: The most drafts that any shape verifies.
        most_masks: The most masks that a row reads.
    """

    def __init__(self, shapes: Sequence[DraftShape], shift: int, reads_causally: bool, device: torch.device) -> None:
        self.shapes, self.shift, self.reads_causally = (*shapes, autoregressive()), shift, reads_causally
        self.without_drafts = len(shapes)
        self.most_pending = max(shape.most_pending for shape in self.shapes)
        self._limits = torch.tensor([shape.most_pending for shape in self.shapes]).to(device)
        self._takes_turns = torch.tensor([shape.takes_turns for shape in self.shapes]).to(device)
        self.most_masks = max(shape.num_masks(d, shift) for shape in self.shapes for d in range(len(shape.groups)))
        self._masks = self._by_mask(self.most_masks).to(device)
        self._groups = self._by_group().to(device)

    def _by_mask(self, width: int) -> Int[Tensor, "k d s 5"]:
        """Of each mask whether it is real, `behind`, `offset`, `first` and `stop`."""

        def of(lengths: Sequence[int]) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = []
            for behind, length in enumerate(lengths):
                first, size = len(found), length + 1 - self.shift if length else 0
                for offset in range(size):
                    stop = first + (offset + 1 if self.reads_causally else size)
                    found.append((1, behind, offset, first, stop))
            return found + [(0, 0, 0, 0, 0)] * (width - len(found))

        found = self._for_all(of)
        return torch.tensor(found, dtype=torch.long).view(len(self.shapes), self.most_pending + 1, width, 5)

    def _by_group(self) -> Int[Tensor, "k d j 2"]:
        """Of each group its first mask that drafts, and how many tokens it drafts."""

        def of(lengths: Sequence[int]) -> list[tuple[int, int]]:
            found, next_mask = [], 0
            for length in lengths:
                found.append((next_mask + 1 - self.shift, length))
                next_mask += length + 1 - self.shift if length else 0
            return found + [(0, 0)] * (self.most_pending + 1 - len(found))

        return torch.tensor(self._for_all(of))

    def _for_all(self, of: Callable[[Sequence[int]], list]) -> list[list[list]]:
        """Something of every shape and number of drafts; beyond a shape's own, what holds without drafts."""
        counts = range(self.most_pending + 1)
        return [[of(shape.groups[d] if d < len(shape.groups) else (0,)) for d in counts] for shape in self.shapes]

    def limit(self, which: Int[Tensor, "b"], pending: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
        """The pending drafts that the rows' shapes can verify."""
        return torch.minimum(pending, self._limits[which])

    def in_turn(self, which: Int[Tensor, "b"], pending: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
        """The shapes of this pass: rows that take turns draft nothing while others of them verify."""
        takes_turns = self._takes_turns[which]
        waits = takes_turns & (pending == 0) & (takes_turns & (pending > 0)).any()
        return torch.where(waits, self.without_drafts, which)

    def masks(self, which: Int[Tensor, "b"], pending: Int[Tensor, "b"], num_masks: int) -> Masks:
        """Those of rows with these shapes and numbers of drafts, the first `num_masks` of each."""
        is_real, behind, offset, first, stop = self._masks[which, pending, :num_masks].unbind(-1)
        start, length = self._groups[which, pending].unbind(-1)
        return Masks(is_real.bool(), behind, offset, first, stop, start, length)
