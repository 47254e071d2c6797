"""Draft shapes as tensors: the place of each mask of a row, by the row's shape and its number of pending drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.sampling.blocks.draft_shapes import DraftShape, autoregressive


@dataclass(frozen=True)
class Drafting:
    """What a row drafts, and what verifies its drafts.

    Attributes:
        shape: The groups of masks.
        by_masks: Whether separate masks, one after the known tokens and one after each draft, verify instead of the
            causal states.
    """

    shape: DraftShape
    by_masks: bool = False

    def num_masks(self, num_pending: int, shift: int, is_drafting: bool = True) -> int:
        """Returns the number of masks that a row with so many drafts reads."""
        return self.num_verifying(num_pending) + self.shape.num_masks(num_pending, shift) * is_drafting

    def num_verifying(self, num_pending: int) -> int:
        """Returns how many of these masks verify."""
        return (num_pending + 1) * self.by_masks


@dataclass(frozen=True)
class Masks:
    """The masks of some rows.

    Attributes:
        is_real: False for padding.
        drafts_before: Number of drafts before each mask's group.
        offset: The mask's place in its group.
        first, stop: The range of masks that it reads, those of its own group.
        start: For each number of right drafts, the first mask that drafts.
        length: For each number of right drafts, how many tokens are drafted.
        is_verifying: Whether the first masks, one after the known tokens and one after each draft, verify.
    """

    is_real: Bool[Tensor, "b s"]
    drafts_before: Int[Tensor, "b s"]
    offset: Int[Tensor, "b s"]
    first: Int[Tensor, "b s"]
    stop: Int[Tensor, "b s"]
    start: Int[Tensor, "b j"]
    length: Int[Tensor, "b j"]
    is_verifying: Bool[Tensor, " b"]


class DraftTables:
    """The masks of several shapes, built once for each set.

    Args:
        draftings: What rows may draft; rows refer to them by index. Two without drafts follow them, one for each
            verifier.
        shift: The model's shift.
        reads_causally: Whether masks of a group do not read later ones.
        device: Where passes run.

    Attributes:
        any_by_masks: Whether masks verify any of them.
        most_pending: The most drafts that any shape verifies.
        most_masks: The most masks that a row reads.
    """

    def __init__(self, draftings: Sequence[Drafting], shift: int, reads_causally: bool, device: torch.device) -> None:
        idle = [Drafting(autoregressive()), Drafting(autoregressive(), by_masks=True)]
        self.draftings, self.shift, self.reads_causally = (*draftings, *idle), shift, reads_causally
        shapes = [each.shape for each in self.draftings]
        self.any_by_masks = any(each.by_masks for each in draftings)
        self.most_pending = max(shape.most_pending for shape in shapes)
        self.most_masks = max(
            each.num_masks(d, shift) for each in draftings for d in range(each.shape.most_pending + 1)
        )
        numbers = [
            [each.shape.most_pending, each.shape.takes_turns, each.by_masks, len(draftings) + each.by_masks]
            for each in self.draftings
        ]
        self._limits, self._takes_turns, self._by_masks, self._idle = torch.tensor(numbers).to(device).unbind(1)
        self._masks = self._by_mask(self.most_masks).to(device)
        self._groups = self._by_group().to(device)

    def _by_mask(self, width: int) -> Int[Tensor, "k d s 5"]:
        """Returns for each mask whether it is real, `drafts_before`, `offset`, `first` and `stop`."""

        def of(lengths: Sequence[int], num_verifying: int) -> list[tuple[int, ...]]:
            found = [(1, drafts_before, 0, drafts_before, drafts_before + 1) for drafts_before in range(num_verifying)]
            for drafts_before, length in enumerate(lengths):
                first, size = len(found), length + 1 - self.shift if length else 0
                for offset in range(size):
                    stop = first + (offset + 1 if self.reads_causally else size)
                    found.append((1, drafts_before, offset, first, stop))
            return (found + [(0, 0, 0, 0, 0)] * (width - len(found)))[:width]

        found = self._for_all(of)
        return torch.tensor(found, dtype=torch.long).view(len(self.draftings), self.most_pending + 1, width, 5)

    def _by_group(self) -> Int[Tensor, "k d j 2"]:
        """Returns for each group its first mask that drafts, and how many tokens it drafts."""

        def of(lengths: Sequence[int], num_verifying: int) -> list[tuple[int, int]]:
            found, next_mask = [], num_verifying
            for length in lengths:
                found.append((next_mask + 1 - self.shift, length))
                next_mask += length + 1 - self.shift if length else 0
            return found + [(0, 0)] * (self.most_pending + 1 - len(found))

        return torch.tensor(self._for_all(of))

    def _for_all(self, of: Callable[[Sequence[int], int], list]) -> list[list[list]]:
        """Calls `of` for every drafting and number of drafts. Beyond the numbers that a drafting has, nothing is
        drafted."""
        counts = range(self.most_pending + 1)
        return [
            [of(each.shape.groups[d] if d < len(each.shape.groups) else (0,), each.num_verifying(d)) for d in counts]
            for each in self.draftings
        ]

    def idle(self, which: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Returns the draftings without drafts that have the same verifiers."""
        return self._idle[which]

    def limit(self, which: Int[Tensor, " b"], pending: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Returns the pending drafts that the rows' shapes can verify."""
        return torch.minimum(pending, self._limits[which])

    def in_turn(self, which: Int[Tensor, " b"], pending: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Returns the draftings for this pass: rows that take turns draft nothing while others of them verify."""
        takes_turns = self._takes_turns[which].bool()
        waits = takes_turns & (pending == 0) & (takes_turns & (pending > 0)).any()
        return torch.where(waits, self._idle[which], which)

    def masks(self, which: Int[Tensor, " b"], pending: Int[Tensor, " b"], num_masks: int) -> Masks:
        """Returns the masks of rows with these draftings and numbers of drafts, the first `num_masks` of each."""
        is_real, drafts_before, offset, first, stop = self._masks[which, pending, :num_masks].unbind(-1)
        start, length = self._groups[which, pending].unbind(-1)
        return Masks(is_real.bool(), drafts_before, offset, first, stop, start, length, self._by_masks[which].bool())
