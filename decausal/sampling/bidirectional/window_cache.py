"""The forward passes over whole rows, and over decode windows with keys and values of an earlier pass.

A row without a cache is read whole in every pass. A row with a cache is read whole when a window begins and every
`cache_refresh` passes. Other passes read its window ("dual"), or the window and everything after it ("prefix"), and
reuse the keys and values of the rest. Those were computed from fewer known tokens, so this is an approximation. It is
exact only if every pass reads the whole row, or in a model of one layer, whose keys and values depend on no other
token.

Source: Fast-dLLM (arXiv 2505.22618).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.diffusion.layout import Layout
from decausal.diffusion.shift import predicting_index
from decausal.models.architecture import sliding_windows
from decausal.models.backbone import body_forward, stock_model
from decausal.models.block_cache import BlockCache, cached_forward, decoding, refuse_uncacheable
from decausal.models.visible_slots import visible_by_layer
from decausal.sampling.settings import CACHES

_PREFIX = CACHES.index("prefix")


class Reading(NamedTuple):
    """Rows to read.

    Attributes:
        ids: Tokens, masked positions holding the mask token.
        document_ids: -1 for padding; None where every row is one document without any.
        lengths: Tokens of each row without its padding.
        places: The cache's row for each.
        cache, cache_refresh: As in `RowSettings`; None if no row has a cache.
        is_inside: Open positions of the current windows.
    """

    ids: Int[Tensor, "A T"]
    document_ids: Int[Tensor, "A T"] | None
    lengths: Int[Tensor, " A"]
    places: Int[Tensor, " A"]
    cache: Int[Tensor, " A"] | None
    cache_refresh: Int[Tensor, " A"] | None
    is_inside: Bool[Tensor, "A T"]

    def rows(self, index: Int[Tensor, " a"]) -> Reading:
        """Returns some of the rows."""
        return Reading(*(None if part is None else part[index] for part in self))


class _Batch(NamedTuple):
    """What one call of the model read: states [b q D], and the first position of each row."""

    rows: list[int] | None  # None: all
    states: Float[Tensor, "b q D"]
    first: Int[Tensor, " b"] | None  # None: 0


class _Plan(NamedTuple):
    """The stretch that a row with a cache reads, on the host."""

    row: int
    place: int
    first: int
    stop: int
    length: int


class WindowReader:
    """Runs a converted model's body, with a cache for rows that ask for it.

    Args:
        model: The model.
        layout: "bidirectional", or "causal" if no row has a cache.
        shift: 1 where the state before a position predicts it.
        num_places: Rows that fit into the cache.
    """

    def __init__(self, model: Any, layout: Layout, shift: int, num_places: int) -> None:
        self._model, self._layout, self._shift, self._num_places = model, layout, shift, num_places
        self._cache: BlockCache | None = None
        self._held: dict[int, tuple[int, int]] = {}  # by place: start of the window, passes since a full one

    def forget(self, place: int) -> None:
        """Forgets what the cache holds for a place, since another row takes it."""
        self._held.pop(place, None)

    def __call__(self, reading: Reading, index: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n D"], Int[Tensor, " A"]]:
        """Returns the states that predict positions, and how many tokens of each row were read.

        Args:
            reading: The rows.
            index: Flat positions in [A * T], of the current windows.
        """
        if reading.cache is None:
            batches, num_read = [_Batch(None, self._whole(reading), None)], reading.lengths
        else:
            batches, num_read = self._with_cache(reading)
        length = reading.ids.shape[1]
        row, position = index // length, predicting_index(index, self._shift) % length
        if len(batches) == 1:
            return _at(batches[0], row, position), num_read
        found = None
        for batch in batches:
            place = torch.full((len(reading.ids),), -1, device=index.device)
            place[batch.rows] = torch.arange(len(batch.rows), device=index.device)
            mine = (place[row] >= 0).nonzero().squeeze(1)
            states = _at(batch, place[row[mine]], position[mine])
            found = states.new_empty(len(index), states.shape[1]) if found is None else found
            found[mine] = states
        return found, num_read

    def _whole(self, reading: Reading) -> Float[Tensor, "A T D"]:
        body = body_forward(self._model, reading.ids, self._layout, document_ids=reading.document_ids)
        return body.last_hidden_state

    def _with_cache(self, reading: Reading) -> tuple[list[_Batch], Int[Tensor, " A"]]:
        without, whole, windows = self._planned(reading)
        num_read, batches = reading.lengths.clone(), []
        if without:
            some = reading.rows(torch.tensor(without, device=reading.ids.device))
            batches.append(_Batch(without, self._whole(some), None))
        for plans in (whole, windows):
            if plans:
                batches.append(self._read(reading.ids, plans))
                for plan in plans:
                    num_read[plan.row] = plan.stop - plan.first
        return batches, num_read

    def _planned(self, reading: Reading) -> tuple[list[int], list[_Plan], list[_Plan]]:
        """Returns rows without a cache, rows to read whole, and rows whose window is read."""
        position = torch.arange(reading.ids.shape[1], device=reading.ids.device)
        first = torch.where(reading.is_inside, position, len(position)).amin(1)
        stop = torch.where(reading.is_inside, position + 1, 0).amax(1)
        columns = [reading.places, reading.cache, reading.cache_refresh, first, stop, reading.lengths]
        without, whole, windows = [], [], []
        for row, (place, cache, refresh, start, end, length) in enumerate(torch.stack(columns, dim=1).tolist()):
            held, num_passes = self._held.get(place, (-1, 0))
            if not cache:
                without.append(row)
            elif held != start or num_passes == refresh:
                self._held[place] = (start, 1)
                whole.append(_Plan(row, place, 0, length, length))
            else:
                self._held[place] = (start, num_passes + 1)
                stop_reading = length if cache == _PREFIX else end
                windows.append(_Plan(row, place, start - self._shift, stop_reading, length))
        return without, whole, windows

    def _read(self, ids: Int[Tensor, "A T"], plans: list[_Plan]) -> _Batch:
        """Reads a stretch of each row, with the rest of it in the cache. Shorter stretches are padded."""
        cache = self._grown(max(plan.length for plan in plans))
        rows, places, first, stop, lengths = torch.tensor(plans, device=ids.device).unbind(1)
        num_keys, width = max(plan.length for plan in plans), max(plan.stop - plan.first for plan in plans)
        positions = first[:, None] + torch.arange(width, device=ids.device)
        is_padding = positions >= stop[:, None]
        slots = positions.masked_fill(is_padding, cache.scratch_slot)
        positions = torch.minimum(positions, lengths[:, None] - 1)
        config = stock_model(self._model).base_model.config
        seen = visible_by_layer(config, positions, (lengths[:, None] - 1).expand_as(positions), num_keys)
        reach = [window for window in sliding_windows(config).values() if window is not None]
        if all(plan.length == num_keys for plan in plans) and min(reach, default=num_keys) >= num_keys:
            seen = num_keys
        states = cached_forward(
            self._model, ids[rows[:, None], positions], positions, slots, seen, cache, _as_slice(plans, places)
        )
        return _Batch([plan.row for plan in plans], states, first)

    def _grown(self, length: int) -> BlockCache:
        if self._cache is None:
            with decoding(self._model):
                refuse_uncacheable(self._model)
            self._cache = BlockCache(stock_model(self._model).base_model.config, self._num_places, length)
        elif self._cache.max_length < length:
            self._cache.grow(length)
        return self._cache


def _at(batch: _Batch, row: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
    offset = position if batch.first is None else position - batch.first[row]
    return batch.states.flatten(0, 1)[row * batch.states.shape[1] + offset]


def _as_slice(plans: list[_Plan], places: Int[Tensor, " b"]) -> slice | Int[Tensor, " b"]:
    """Returns consecutive places as a slice, which avoids a copy of their keys and values."""
    start = plans[0].place
    if [plan.place for plan in plans] == list(range(start, start + len(plans))):
        return slice(start, start + len(plans))
    return places
