"""Holds keys and values of beginnings that rows share, so that a system prompt or a conversation's turns are read once.

Beginnings are held in pages of `PAGE` tokens. A page is identified by the page before it and its own tokens. So two
rows share it only if all tokens up to its end are the same. Under causal attention the keys and values of these tokens
do not depend on what follows. The least recently used pages are dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decausal.models.block_cache import BlockCache, zeros

PAGE = 16
"""Tokens of a page."""
Key = tuple[int, tuple[int, ...]]
"""The serial number of the page before it, and its tokens."""


@dataclass(frozen=True)
class _Page:
    """A held page: its serial number, which is never reused, and its place in memory."""

    serial: int
    place: int


class PrefixCache:
    """Pages that are copied from rows of a cache and back.

    Args:
        cache: The rows' keys and values.
        num_tokens: Most tokens to hold. Memory for all of them is taken when the first page is stored.
    """

    def __init__(self, cache: BlockCache, num_tokens: int) -> None:
        self._cache, self._num_places = cache, num_tokens // PAGE
        self._pages: OrderedDict[Key, _Page] = OrderedDict()
        self._held: list[tuple[Float[Tensor, "P p H d"], Float[Tensor, "P p H d"]]] = []
        self._num_stored = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are held now."""
        return len(self._pages) * PAGE

    def missing(self, ids: Sequence[int]) -> Key | None:
        """Returns the first page of a row that is not held; None if all its whole pages are."""
        key = self._key(ids, self._found(ids))
        return key if len(key[1]) == PAGE else None

    def length(self, ids: Sequence[int]) -> int:
        """Returns how many tokens from a row's beginning are held."""
        return len(self._found(ids)) * PAGE

    def load(self, ids: Sequence[int], row: int) -> int:
        """Copies the held beginning of a row into its place; returns the number of its tokens."""
        pages = self._found(ids)
        if not pages:
            return 0
        self._touch(ids, pages)
        length = len(pages) * PAGE
        for layer, held in zip(self._cache.layers, self._held, strict=True):
            places = torch.tensor([page.place for page in pages]).to(layer.keys.device)
            layer.keys[row, :length] = held[0][places].flatten(0, 1)
            layer.values[row, :length] = held[1][places].flatten(0, 1)
        return length

    def store(self, ids: Sequence[int], row: int) -> None:
        """Holds the whole pages of tokens that a row has read."""
        pages = self._found(ids)
        self._touch(ids, pages)
        while len(pages) < min(len(ids) // PAGE, self._num_places):
            page = _Page(self._num_stored, self._free_place())
            self._num_stored += 1
            start = len(pages) * PAGE
            self._pages[self._key(ids, pages)] = page
            self._copy(row, slice(start, start + PAGE), page.place)
            pages.append(page)

    def _touch(self, ids: Sequence[int], pages: Sequence[_Page]) -> None:
        """Marks pages as recently used. Later pages are dropped before earlier ones, without which they are useless."""
        for place in reversed(range(len(pages))):
            self._pages.move_to_end(self._key(ids, pages[:place]))

    def _copy(self, row: int, slots: slice, place: int) -> None:
        if not self._held:
            self._held = [
                tuple(zeros(held, self._num_places, PAGE, *held.shape[2:]) for held in (layer.keys, layer.values))
                for layer in self._cache.layers
            ]
        for layer, (keys, values) in zip(self._cache.layers, self._held, strict=True):
            keys[place], values[place] = layer.keys[row, slots], layer.values[row, slots]

    def _found(self, ids: Sequence[int]) -> list[_Page]:
        """Returns the held pages of a row, from its beginning on."""
        pages: list[_Page] = []
        while (page := self._pages.get(self._key(ids, pages))) is not None:
            pages.append(page)
        return pages

    def _key(self, ids: Sequence[int], before: Sequence[_Page]) -> Key:
        start = len(before) * PAGE
        return (before[-1].serial if before else -1, tuple(ids[start : start + PAGE]))

    def _free_place(self) -> int:
        if len(self._pages) < self._num_places:
            return len(self._pages)
        return self._pages.popitem(last=False)[1].place
