"""The rows that a block engine decodes together, as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class NewRow:
    """A row to be admitted.

    Attributes:
        place: Where it goes.
        prompt_ids: Given tokens. Those of whole blocks are context, the rest is fixed in the first block.
        limit: First position that is not wanted any more.
        seed: The seed of its random numbers.
        is_first_alone: Whether the first token of each block is kept in a separate step.
        ends: Tokens that end the row.
    """

    place: int
    prompt_ids: list[int]
    limit: int
    seed: int
    is_first_alone: bool = False
    ends: tuple[int, ...] = ()


class BlockRows:
    """State of rows 0 to R - 1, of which the first are in use. It is written in place, at fixed addresses.

    Attributes:
        ids: Given and finished tokens, [R S]. The open block is in `block_ids`.
        start: First position of the block that is being denoised, [R].
        committed: Positions before this one have their keys and values in the cache, [R].
        limit: First position that is not wanted any more, [R].
        seed: Seeds of random numbers, [R].
        ends: Tokens that end each row, -1 where it has fewer, [R E].
        step: Denoising steps of the block so far, [R].
        is_first_alone: Whether a block's first token is kept in a separate step, [R].
        block_ids: The block, masked positions holding the mask token, [R K].
        is_open: Positions of the block that were not given, [R K].
        is_masked: Open positions that are not kept yet, [R K].
        is_eligible: Masked positions before a kept end token. Before the first step of a row with `is_first_alone`,
            only the first, [R K].
        kept_in: Step in which a position was kept, -1 for none, [R K].
        clean_state: State of the finished token before the block, which predicts its first token under shift 1, [R D].
    """

    def __init__(
        self,
        num_rows: int,
        length: int,
        block_size: int,
        mask_token_id: int,
        device: torch.device,
    ) -> None:
        def vector(dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(num_rows, dtype=dtype, device=device)

        def block(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_rows, block_size, dtype=dtype, device=device)

        self.block_size, self.mask_token_id, self.device = block_size, mask_token_id, device
        self.offsets = torch.arange(block_size, device=device)
        self.places = torch.arange(num_rows * block_size, device=device)
        self.ends = torch.zeros(num_rows, 0, dtype=torch.long, device=device)
        self.ids = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        self.start, self.committed, self.limit, self.seed, self.step = (vector() for _ in range(5))
        self.is_first_alone = vector(torch.bool)
        self.block_ids, self.kept_in = block(torch.long), block(torch.long)
        self.is_open, self.is_masked, self.is_eligible = (block(torch.bool) for _ in range(3))
        self.clean_state: Float[Tensor, "R D"] | None = None

    def grow(self, length: int) -> None:
        """Makes room for rows of `length` tokens."""
        self.ids = _widened(self.ids, length, 0)

    def grow_ends(self, num_ends: int) -> None:
        """Makes room for rows with so many end tokens."""
        self.ends = _widened(self.ends, num_ends, -1)

    def move(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        for tensor in self._tensors():
            tensor[target] = tensor[source]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undoes everything that is written inside the context."""
        saved = [(tensor, tensor.clone()) for tensor in self._tensors()]
        yield
        for tensor, before in saved:
            tensor.copy_(before)

    def _tensors(self) -> list[Tensor]:
        fixed = ("offsets", "places")
        return [value for name, value in vars(self).items() if isinstance(value, Tensor) and name not in fixed]

    def admit(self, rows: list[NewRow]) -> None:
        """Writes rows in: their prompts, and their first blocks with everything open masked."""
        size = self.block_size
        starts = [len(row.prompt_ids) // size * size for row in rows]
        longest = max(starts) + size
        ids = torch.full((len(rows), longest), self.mask_token_id)
        ends = torch.full((len(rows), self.ends.shape[1]), -1)
        for index, row in enumerate(rows):
            ids[index, : len(row.prompt_ids)] = torch.tensor(row.prompt_ids, dtype=torch.long)
            ends[index, : len(row.ends)] = torch.tensor(row.ends, dtype=torch.long)
        numbers = torch.tensor(
            [
                [row.place, start, len(row.prompt_ids), row.limit, row.seed, row.is_first_alone]
                for row, start in zip(rows, starts, strict=True)
            ]
        ).to(self.device)
        place, start, given, limit, seed, is_first_alone = numbers.unbind(1)
        ids = ids.to(self.device)
        position = start[:, None] + self.offsets
        is_open = position >= given[:, None]
        self.ids[place, :longest], self.ends[place] = ids, ends.to(self.device)
        self.start[place], self.limit[place], self.seed[place] = start, limit, seed
        self.committed[place], self.step[place] = 0, 0
        self.is_first_alone[place] = is_first_alone.bool()
        self.block_ids[place], self.kept_in[place] = ids.gather(1, position), -1
        self.is_open[place] = self.is_masked[place] = is_open
        self.is_eligible[place] = self._first_eligible(place, is_open)

    def next_blocks(self, num_rows: int, is_done: list[bool]) -> None:
        """Moves rows whose block is done to the next block, which is fully masked."""
        here = slice(0, num_rows)
        start, block_ids = self.start[here], self.block_ids[here]
        self.ids[here].scatter_(1, self.positions(here), block_ids)
        if all(is_done):
            start += self.block_size
            block_ids.fill_(self.mask_token_id)
            if self.block_size > 1:  # with one token, no step ever changes these
                self.step[here] = 0
                self.kept_in[here] = -1
                self.is_open[here] = self.is_masked[here] = True
                self.is_eligible[here] = self._first_eligible(here, self.is_open[here])
            return
        done = torch.tensor(is_done, device=self.device)
        start += done * self.block_size
        self.step[here].masked_fill_(done, 0)
        block_ids.masked_fill_(done[:, None], self.mask_token_id)
        self.kept_in[here].masked_fill_(done[:, None], -1)
        self.is_open[here] |= done[:, None]
        self.is_masked[here] |= done[:, None]
        first = self._first_eligible(here, self.is_open[here])
        self.is_eligible[here] = torch.where(done[:, None], first, self.is_eligible[here])

    def _first_eligible(self, here: slice | Int[Tensor, " b"], is_open: Bool[Tensor, "b K"]) -> Bool[Tensor, "b K"]:
        """Returns what may be kept in a block's first step: only the first token, if it is open and kept alone."""
        is_alone = self.is_first_alone[here, None] & is_open[:, :1]
        return is_open & ~(is_alone & (self.offsets > 0))

    def positions(self, here: slice) -> Int[Tensor, "b K"]:
        """Returns the positions of the rows' blocks."""
        return self.start[here, None] + self.offsets


def _widened(rows: Int[Tensor, "R n"], width: int, fill: int) -> Int[Tensor, "R w"]:
    """Returns the tensor with more columns, which hold `fill`."""
    wider = rows.new_full((len(rows), width), fill)
    wider[:, : rows.shape[1]] = rows
    return wider
