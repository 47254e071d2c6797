"""The rows that a block engine decodes together, as tensors, and what one step keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.objectives.head import Head
from decausal.sampling.candidates import uniform_numbers
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.selection import best, candidates, num_to_keep


@dataclass
class NewRow:
    """A row that enters.

    Attributes:
        place: where it goes.
        prompt_ids: given tokens; those of whole blocks are context, the rest is fixed in the first block.
        limit: first position that is not wanted any more.
        seed: of its random numbers.
        is_first_alone: the first token of each block is kept in a step of its own.
        ends: tokens that end it.
    """

    place: int
    prompt_ids: list[int]
    limit: int
    seed: int
    is_first_alone: bool = False
    ends: tuple[int, ...] = ()


class BlockRows:
    """State of rows 0 to R - 1, of which the first ones are in use; written in place, at fixed addresses.

    Attributes:
        ids: given and finished tokens, [R S]; what is still being denoised is in `block_ids`.
        start: first position of the block that is being denoised, [R].
        committed: positions before this one have their keys and values in the cache, [R].
        limit: first position that is not wanted any more, [R].
        seed: of random numbers, [R].
        ends: tokens that end each row, -1 where it has fewer, [R E].
        step: denoising steps that the block has had, [R].
        is_first_alone: a block's first token is kept in a step of its own, [R].
        block_ids: the block, masked positions holding the mask token, [R K].
        is_open: positions of the block that were not given, [R K].
        is_masked: of these, the ones not kept, [R K].
        is_candidate: of these, the ones before a kept end token; before the first step of a row with `is_first_alone`
            the first alone, [R K].
        kept_in: step in which a position was kept, -1 for none, [R K].
        clean_state: state of the finished token before the block, which predicts its first token under shift 1, [R D].
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
        self._places = torch.arange(num_rows * block_size, device=device)
        self.ends = torch.zeros(num_rows, 0, dtype=torch.long, device=device)
        self.ids = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        self.start, self.committed, self.limit, self.seed, self.step = (vector() for _ in range(5))
        self.is_first_alone = vector(torch.bool)
        self.block_ids, self.kept_in = block(torch.long), block(torch.long)
        self.is_open, self.is_masked, self.is_candidate = (block(torch.bool) for _ in range(3))
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
        """Whatever is written inside is undone."""
        saved = [(tensor, tensor.clone()) for tensor in self._tensors()]
        yield
        for tensor, before in saved:
            tensor.copy_(before)

    def _tensors(self) -> list[Tensor]:
        fixed = ("offsets", "_places")
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
        self.is_candidate[place] = self._first_candidates(place, is_open)

    def keep(
        self,
        num_rows: int,
        num_candidates: int | None,
        states: Float[Tensor, "b K D"],
        head: Head,
        settings: RowSettings,
    ) -> Int[Tensor, "b told"]:
        """One step: draws candidates, keeps the best, and says what is to be told to the host.

        Args:
            num_rows: rows in use.
            num_candidates: masked positions in them that may be kept, which the host knows from the step before. None:
                every position is scored, whether it may be kept or not, so that nothing has the shape of that number.
            states: the state that predicts each position of the block.
            head: the model's head, the mask token banned.
            settings: one per row.

        Returns:
            Per row, the K ids of its block, the K steps in which they were kept, how many candidates are left, and
            whether any of those is wanted (0: the block is done).
        """
        if self.block_size == 1:
            return self._keep_single(num_rows, states, head, settings)
        here = slice(0, num_rows)
        block_ids, is_masked, is_candidate = self.block_ids[here], self.is_masked[here], self.is_candidate[here]
        kept_in, step = self.kept_in[here], self.step[here]
        tokens, scores = self._candidates(num_rows, num_candidates, states, head, settings)
        is_kept = best(scores, num_to_keep(scores, self.is_open[here], is_masked, settings, step)) & is_candidate
        block_ids.copy_(torch.where(is_kept, tokens, block_ids))
        kept_in.copy_(torch.where(is_kept, step[:, None], kept_in))
        is_masked &= ~is_kept
        is_candidate.copy_(is_masked)
        if self.ends.shape[1]:
            is_end = (block_ids[..., None] == self.ends[here, None]).any(-1) & self.is_open[here] & ~is_masked
            is_candidate &= is_end.cumsum(1) == 0
        is_wanted = is_candidate & (self._positions(here) < self.limit[here, None])
        step += 1
        told = [block_ids, kept_in, is_candidate.sum(1, keepdim=True), is_wanted.any(1, keepdim=True)]
        return torch.cat(told, dim=1)

    def _keep_single(
        self, num_rows: int, states: Float[Tensor, "b 1 D"], head: Head, settings: RowSettings
    ) -> Int[Tensor, "b told"]:
        """`keep` where a block is one token: each is kept, and no score decides anything."""
        here = slice(0, num_rows)
        numbers = None
        if not settings.is_greedy:
            numbers = uniform_numbers(self.seed[here], 0, self.start[here])
        tokens, _ = candidates(states[:, 0], head, settings, numbers, is_scored=False)
        self.block_ids[here] = tokens[:, None]
        return torch.nn.functional.pad(tokens[:, None], (0, 3))

    def next_blocks(self, num_rows: int, is_done: list[bool]) -> None:
        """Rows whose block is done go on to the next one, all of it masked."""
        here = slice(0, num_rows)
        start, block_ids = self.start[here], self.block_ids[here]
        self.ids[here].scatter_(1, self._positions(here), block_ids)
        if all(is_done):
            start += self.block_size
            block_ids.fill_(self.mask_token_id)
            if self.block_size > 1:  # else no step ever changes these
                self.step[here] = 0
                self.kept_in[here] = -1
                self.is_open[here] = self.is_masked[here] = True
                self.is_candidate[here] = self._first_candidates(here, self.is_open[here])
            return
        done = torch.tensor(is_done, device=self.device)
        start += done * self.block_size
        self.step[here].masked_fill_(done, 0)
        block_ids.masked_fill_(done[:, None], self.mask_token_id)
        self.kept_in[here].masked_fill_(done[:, None], -1)
        self.is_open[here] |= done[:, None]
        self.is_masked[here] |= done[:, None]
        first = self._first_candidates(here, self.is_open[here])
        self.is_candidate[here] = torch.where(done[:, None], first, self.is_candidate[here])

    def _first_candidates(self, here: slice | Int[Tensor, "b"], is_open: Bool[Tensor, "b K"]) -> Bool[Tensor, "b K"]:
        """What may be kept in a block's first step: where the first is alone and open, no other."""
        is_alone = self.is_first_alone[here, None] & is_open[:, :1]
        return is_open & ~(is_alone & (self.offsets > 0))

    def _positions(self, here: slice) -> Int[Tensor, "b K"]:
        return self.start[here, None] + self.offsets

    def _candidates(
        self,
        num_rows: int,
        num_candidates: int | None,
        states: Float[Tensor, "b K D"],
        head: Head,
        settings: RowSettings,
    ) -> tuple[Int[Tensor, "b K"], Float[Tensor, "b K"]]:
        """A token and its score, -inf where there is no candidate."""
        size, shape = self.block_size, (num_rows, self.block_size)
        flat = states.flatten(0, 1)
        is_everywhere = num_candidates in (None, len(flat))
        if is_everywhere:
            index = self._places[: len(flat)]
        else:
            index = torch.nonzero_static(self.is_candidate[:num_rows].view(-1), size=num_candidates).squeeze(1)
            flat = flat[index]
        row = index // size
        numbers = None
        if not settings.is_greedy:
            numbers = uniform_numbers(self.seed[row], self.step[row], self.start[row] + index % size)
        tokens, scores = candidates(flat, head, settings.at(row), numbers)
        if num_candidates is None:
            scores = scores.masked_fill(~self.is_candidate[:num_rows].view(-1), -torch.inf)
        if is_everywhere:
            return tokens.view(shape), scores.view(shape)
        all_tokens = tokens.new_zeros(num_rows * size).index_copy_(0, index, tokens)
        all_scores = scores.new_full((num_rows * size,), -torch.inf).index_copy_(0, index, scores)
        return all_tokens.view(shape), all_scores.view(shape)


def _widened(rows: Int[Tensor, "R n"], width: int, fill: int) -> Int[Tensor, "R w"]:
    """More columns, holding `fill`."""
    wider = rows.new_full((len(rows), width), fill)
    wider[:, : rows.shape[1]] = rows
    return wider
