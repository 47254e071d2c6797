"""The rows that self-speculation writes together, as tensors: known tokens, drafts, and a pass over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from decausal.models.architecture import context_length, sliding_windows
from decausal.models.backbone import denoising_head, stock_model
from decausal.models.block_cache import BlockCache, cached_forward
from decausal.models.draft_head import draft_head_of, draft_vocabulary, embedded
from decausal.models.facts import ConversionFacts
from decausal.models.gated import without_masks
from decausal.objectives.head import Head, logits
from decausal.sampling.blocks.draft_tables import DraftTables, Masks
from decausal.sampling.blocks.extent import Extent
from decausal.sampling.blocks.recording import PassRecorder, Recordings, keys_of_recording
from decausal.sampling.drawing import uniform_numbers
from decausal.sampling.row_settings import RowSettings

Places = slice | Int[Tensor, "b"]


class Read(NamedTuple):
    """The results of a pass for its rows.

    Attributes:
        outcome: For each row, the number of tokens (0 if more of the prompt has to be read), then the tokens, then
            padding.
        states: The states that predict them under causal attention, followed by others.
    """

    outcome: Int[Tensor, "b outcome"]
    states: Float[Tensor, "b p D"]


class _Queries(NamedTuple):
    """What a pass reads: known tokens and drafts in order, then masks.

    Attributes:
        given: Known tokens of each row.
        is_whole: Whether nothing is left to read after them.
        pending: Drafts after them.
        position, is_real: Positions of known tokens and drafts, and whether they are more than padding.
        masks: The masks after them.
    """

    given: Int[Tensor, " b"]
    is_whole: Bool[Tensor, " b"]
    pending: Int[Tensor, " b"]
    position: Int[Tensor, "b q"]
    is_real: Bool[Tensor, "b q"]
    masks: Masks


class SpeculativeRows:
    """State of rows 0 to R - 1, of which the first `num_rows` are in use.

    Attributes:
        ids: Known tokens and, after them, the drafts, [R S].
        num_known: Tokens that are known, [R].
        num_cached: Known tokens in the cache, [R].
        num_pending: Pending drafts, [R].
        seeds: Seeds of random numbers, [R].
        shape: The index in `tables` of what each row drafts, [R].
        tables: The draftings in use.
    """

    def __init__(
        self,
        model: Any,
        facts: ConversionFacts,
        *,
        tables: DraftTables,
        max_rows: int,
        num_slots: int,
        record: PassRecorder | None = None,
    ) -> None:
        self.model, self.facts, self.tables = model, facts, tables
        device = stock_model(model).get_input_embeddings().weight.device
        self.cache = BlockCache(stock_model(model).base_model.config, max_rows, num_slots)
        self._vocabulary = draft_vocabulary(model, facts.mask_token_id)
        self.num_rows = 0
        self.ids = torch.zeros(max_rows, num_slots, dtype=torch.long, device=device)
        self._columns = torch.zeros(5, max_rows, dtype=torch.long, device=device)
        self.num_known, self.num_cached, self.num_pending, self.seeds, self.shape = self._columns
        self._recordings = None if record is None else Recordings(record, self._unchanged)

    @property
    def head(self) -> Head:
        """The model's head, with the mask token banned."""
        return denoising_head(self.model, self.facts.mask_token_id)

    def use(self, tables: DraftTables, shapes: Sequence[int]) -> None:
        """Makes rows draft by other tables. `shapes` holds each row's index in them."""
        self.tables = tables
        self.shape[: self.num_rows] = torch.tensor(list(shapes), dtype=torch.long)

    def make_room(self, num_slots: int) -> None:
        """Makes room for rows with so many tokens, drafts and masks, and keeps what is stored."""
        if num_slots > self.cache.max_length:
            self.ids = torch.nn.functional.pad(self.ids, (0, num_slots - self.cache.max_length))
            self.cache.grow(num_slots)
            if self._recordings is not None:
                self._recordings.forget()

    def admit(self, prompt: Sequence[int], seed: int, shape: int) -> None:
        """Adds a prompt after the rows in use."""
        row, self.num_rows = self.num_rows, self.num_rows + 1
        self.ids[row, : len(prompt)] = torch.tensor(list(prompt))
        self._columns[:, row] = torch.tensor([len(prompt), 0, 0, seed, shape])

    def move(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        self.cache.move_row(source, target)
        self.ids[target] = self.ids[source]
        self._columns[:, target] = self._columns[:, source]

    def swap(self, one: int, other: int) -> None:
        """Exchanges two rows."""
        self.cache.swap_rows(one, other)
        for tensor in (self.ids, self._columns.T):
            tensor[[one, other]] = tensor[[other, one]]

    def read(self, rows: Places, extent: Extent, settings: RowSettings) -> Read:
        """Takes some rows one pass further.

        Args:
            rows: Which.
            extent: The most that is read of any of them.
            settings: The settings of each row.
        """
        if self._recordings is not None and rows == slice(0, len(settings.temperature)) and extent.num_given == 1:
            num_rows = len(settings.temperature)
            found = self._recordings.run(
                (self.tables, num_rows, extent), num_rows, settings, lambda own: self._read(rows, extent, own)
            )
            if found is not None:
                return found
        return self._read(rows, extent, settings)

    def rounded(self, extent: Extent) -> Extent:
        """Returns an extent for recorded passes over rows that have read their prompts: one of few."""
        tables, num_keys = self.tables, keys_of_recording(extent.num_keys, self.cache.max_length)
        longest = max(drafting.shape.longest_group for drafting in tables.draftings)
        return Extent(1, tables.most_pending, tables.most_masks, longest, num_keys)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Undoes everything that is written inside the context except to the cache, where the same is written again."""
        saved = [(tensor, tensor.clone()) for tensor in (self.ids, self._columns)]
        yield
        for tensor, before in saved:
            tensor.copy_(before)

    def _read(self, rows: Places, extent: Extent, settings: RowSettings) -> Read:
        queries = self._queries(rows, extent)
        in_order, of_masks = self._states(rows, queries, extent)
        verify_states = self._verifying(queries, in_order, of_masks, extent)
        own = self._own(rows, queries, verify_states, settings)
        num_right = self._num_right(rows, queries, own)
        outcome = self._extend(rows, queries, own, num_right)
        self._draft(rows, queries, verify_states, of_masks, num_right, extent.num_new, settings)
        return Read(outcome, verify_states)

    def _queries(self, rows: Places, extent: Extent) -> _Queries:
        known, cached = self.num_known[rows], self.num_cached[rows]
        given = (known - cached).clamp(max=extent.num_given)
        is_whole = cached + given == known
        shape = self.shape[rows]
        shape = torch.where(is_whole, shape, self.tables.idle(shape))
        pending = self.tables.limit(shape, self.num_pending[rows])
        shape = self.tables.in_turn(shape, pending)
        place = torch.arange(extent.num_given + extent.num_drafts, device=known.device)
        last = (given + pending - 1)[:, None]  # padding queries are copies of it
        position, is_real = cached[:, None] + torch.minimum(place, last), place <= last
        masks = self.tables.masks(shape, pending, extent.num_masks)
        return _Queries(given, is_whole, pending, position, is_real, masks)

    def _states(
        self, rows: Places, queries: _Queries, extent: Extent
    ) -> tuple[Float[Tensor, "b q D"], Float[Tensor, "b s D"]]:
        """Runs a forward pass. Returns the states of known tokens and drafts, and those of masks."""
        masks, end = queries.masks, self.num_cached[rows] + queries.given
        mask_position = end[:, None] + masks.drafts_before + masks.offset
        base = end + queries.pending
        mask_slot = base[:, None] + torch.arange(extent.num_masks, device=end.device)
        scratch = self.cache.scratch_slot
        slots = [
            torch.where(queries.is_real, queries.position, scratch),
            torch.where(masks.is_real, mask_slot, scratch),
        ]
        position = torch.cat([queries.position, mask_position], dim=1)
        longest = context_length(stock_model(self.model).config)
        known_ids = self.ids[rows].gather(1, queries.position)
        config = stock_model(self.model).base_model.config
        with nullcontext() if extent.num_masks else without_masks(self.model):
            hidden = cached_forward(
                self.model,
                torch.cat([known_ids, torch.full_like(mask_slot, self.facts.mask_token_id)], dim=1),
                position if longest is None else position.clamp(max=longest - 1),
                torch.cat(slots, dim=1),
                _visible(config, queries, position, end, base, extent.num_keys),
                self.cache,
                rows,
            )
        width = queries.position.shape[1]
        return hidden[:, :width], hidden[:, width:]

    def _verifying(
        self, queries: _Queries, in_order: Float[Tensor, "b q D"], of_masks: Float[Tensor, "b s D"], extent: Extent
    ) -> Float[Tensor, "b p D"]:
        """Returns the states that predict the token after the known tokens and the token after each draft."""
        last = (queries.given - 1)[:, None] + torch.arange(extent.num_drafts + 1, device=in_order.device)
        last = last.clamp(max=in_order.shape[1] - 1)
        causal = in_order.gather(1, last[..., None].expand(-1, -1, in_order.shape[-1]))
        if not self.tables.any_by_masks:
            return causal
        missing = causal.shape[1] - of_masks.shape[1]
        masks = torch.nn.functional.pad(of_masks, (0, 0, 0, max(missing, 0)))[:, : causal.shape[1]]
        return torch.where(queries.masks.is_verifying[:, None, None], masks, causal)

    def _own(
        self, rows: Places, queries: _Queries, states: Float[Tensor, "b p D"], settings: RowSettings
    ) -> Int[Tensor, "b p"]:
        """Returns the causal model's own tokens after the known ones and after each draft."""
        end = self.num_cached[rows] + queries.given
        return self._chosen(rows, states, end, settings)

    def _chosen(
        self,
        rows: Places,
        states: Float[Tensor, "b p D"],
        start: Int[Tensor, " b"],
        settings: RowSettings,
        head: Head | None = None,
    ) -> Int[Tensor, "b p"]:
        """Returns a token for each of the positions from `start` on.

        Each position has its own random number, for drafts and verifier alike. So the verifier's token is what the
        model would write there without drafts, and a draft from the same number most likely equals it.
        """
        shape, device = states.shape[:2], states.device
        numbers = None
        if not settings.is_greedy:
            position = start[:, None] + torch.arange(shape[1], device=device)
            numbers = uniform_numbers(self.seeds[rows][:, None].expand(shape).flatten(), 0, position.flatten())
        row = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
        return settings.at(row).chosen(logits(states.flatten(0, 1), head or self.head), numbers).view(shape)

    def _num_right(self, rows: Places, queries: _Queries, own: Int[Tensor, "b p"]) -> Int[Tensor, " b"]:
        """Returns how many drafts equal the model's own tokens."""
        place = torch.arange(own.shape[1] - 1, device=own.device)
        end = (self.num_cached[rows] + queries.given)[:, None]
        drafts = self.ids[rows].gather(1, end + place)
        is_right = (drafts == own[:, :-1]) & (place < queries.pending[:, None])
        return is_right.long().cumprod(1).sum(1)

    def _extend(
        self, rows: Places, queries: _Queries, own: Int[Tensor, "b p"], num_right: Int[Tensor, " b"]
    ) -> Int[Tensor, "b outcome"]:
        """Adds the right drafts and the token after them to the known tokens."""
        end = self.num_cached[rows] + queries.given
        last = own.gather(1, num_right[:, None])
        place = (end + num_right)[:, None]
        kept = self.ids[rows].gather(1, place)  # for a prompt that has not been read to its end
        self.ids[rows] = self.ids[rows].scatter(1, place, torch.where(queries.is_whole[:, None], last, kept))
        num_new = (num_right + 1) * queries.is_whole
        self.num_known[rows] += num_new
        self.num_cached[rows] = end + num_right
        return torch.cat([num_new[:, None], own], dim=1)

    def _draft(
        self,
        rows: Places,
        queries: _Queries,
        verify_states: Float[Tensor, "b p D"],
        of_masks: Float[Tensor, "b s D"],
        num_right: Int[Tensor, " b"],
        num_new: int,
        settings: RowSettings,
    ) -> None:
        """Draws the next drafts and puts them after the known tokens."""
        masks = queries.masks
        length = masks.length.gather(1, num_right[:, None])
        self.num_pending[rows] = length[:, 0] * queries.is_whole
        if not num_new:
            return
        place = torch.arange(num_new, device=length.device)
        index = (masks.start.gather(1, num_right[:, None]) + place).clamp(max=of_masks.shape[1] - 1)
        states = of_masks.gather(1, index[..., None].expand(-1, -1, of_masks.shape[-1]))
        known = self.num_known[rows]
        predicting = verify_states.gather(1, num_right[:, None, None].expand(-1, -1, states.shape[-1]))[:, 0]
        tokens = self._drafts(rows, states, predicting, known, settings)
        where = known[:, None] + place
        before = self.ids[rows].gather(1, where)
        self.ids[rows] = self.ids[rows].scatter(1, where, torch.where(place < length, tokens, before))

    def _drafts(
        self,
        rows: Places,
        states: Float[Tensor, "b n D"],
        predicting: Float[Tensor, "b D"],
        known: Int[Tensor, " b"],
        settings: RowSettings,
    ) -> Int[Tensor, "b n"]:
        """Returns tokens for the positions from `known` on: all at once, or one after the other by a draft head.

        Args:
            rows: Which.
            states: The states of the masks.
            predicting: The causal state that predicted the last known token.
            known: Number of known tokens.
            settings: The settings of each row.
        """
        head = draft_head_of(self.model)
        if head is None:
            return self._chosen(rows, states, known, settings)
        found = [self.ids[rows].gather(1, known[:, None] - 1)]
        for place, mask in enumerate(states.unbind(1)):
            predicting = head(mask, embedded(self.model, found[-1][:, 0]), predicting)
            chosen = self._chosen(rows, predicting[:, None], known + place, settings, self._vocabulary.head)
            found.append(self._vocabulary.ids(chosen))
        return torch.cat(found[1:], dim=1)


def _visible(
    config: PretrainedConfig,
    queries: _Queries,
    position: Int[Tensor, "b p"],
    end: Int[Tensor, " b"],
    base: Int[Tensor, " b"],
    num_keys: int,
) -> Bool[Tensor, "b p n"] | dict[str, Bool[Tensor, "b p n"]]:
    """Returns which slots each query reads, by layer type if layers have sliding windows.

    Known tokens and drafts read what precedes them. Masks after j drafts read what precedes position end + j, and masks
    of their own group. Slots from `base` on hold masks.
    """
    masks, slot = queries.masks, torch.arange(num_keys, device=position.device)
    mask = slot - base[:, None, None]
    of_group = (mask >= masks.first[..., None]) & (mask < masks.stop[..., None])
    before = slot < (end[:, None] + masks.drafts_before)[..., None]
    in_order = torch.cat([slot <= queries.position[..., None], of_group | before], dim=1)

    def seen(window: int | None) -> Bool[Tensor, "b p n"]:
        if window is None or window >= num_keys:
            return in_order
        held = slot.expand(len(base), -1)
        if masks.drafts_before.shape[1]:
            which = (held - base[:, None]).clamp(0, masks.drafts_before.shape[1] - 1)
            of_mask = end[:, None] + (masks.drafts_before + masks.offset).gather(1, which)
            held = torch.where(held < base[:, None], held, of_mask)
        return in_order & ((position[..., None] - held[:, None]).abs() < window)

    by_layer = {kind: seen(window) for kind, window in sliding_windows(config).items()}
    return by_layer if len(by_layer) > 1 else next(iter(by_layer.values()))
