"""The forward passes of a block engine. Each row reads its own span; similar spans share a batch.

A row's span begins with its first token that is not in the cache yet and ends with the open block. So it is the prompt
and a block when the row enters, the finished block and the next one (which commits the former), or one block. With
block size 1 and shift 1, which is the autoregressive model, no masked token is ever read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.devices import free_operations
from decausal.diffusion.layout import Layout
from decausal.models.architecture import sliding_windows
from decausal.models.backbone import stock_model
from decausal.models.block_cache import BlockCache, cached_forward
from decausal.models.visible_slots import visible_by_layer
from decausal.sampling.blocks.rows import BlockRows

NUM_KNOWN_OFFSETS = 64


@dataclass
class Reader:
    """Runs the model over the spans of rows.

    Attributes:
        model: The model.
        layout: A layout of kind "block".
        shift: 1 if a block's first token is predicted by the clean state before it.
        cache: Keys and values.
        rows: The state of the rows.
    """

    model: Any
    layout: Layout
    shift: int
    cache: BlockCache
    rows: BlockRows

    def __post_init__(self) -> None:
        body = stock_model(self.model).base_model
        self.config = body.config
        self._known_offsets: dict[tuple[int, int], Tensor] = {}
        num_weights = sum(weight.numel() for weight in body.parameters()) - body.get_input_embeddings().weight.numel()
        free = free_operations(self.rows.device, self.config.num_hidden_layers, num_weights)
        self.free_padding = int(free / (2 * max(1, num_weights)))
        self.shortest_window = min((w for w in sliding_windows(self.config).values() if w is not None), default=None)
        self.is_autoregressive = self.layout.block_size == 1 and self.shift == 1

    def commit(self, spans: list[range]) -> None:
        """Commits finished tokens without reading open blocks: the spans end before them."""
        self._read(spans, tail=0)

    def predict(self, spans: list[range]) -> Float[Tensor, "b K D"]:
        """Reads the spans of rows 0 to b - 1 and returns the state that predicts each position of their blocks."""
        if self.is_autoregressive:
            self._read([range(span.start, span.stop - 1) for span in spans], tail=0)
            return self._predicting(None, len(spans))
        return self._predicting(self._read(spans, tail=self.layout.block_size), len(spans))

    def predict_fixed(self, num_rows: int, width: int, num_keys: int) -> Float[Tensor, "b K D"]:
        """Does what `predict` does in a shape that does not depend on the rows. Only tensors say what each row reads.

        Args:
            num_rows: Rows 0 to b - 1, whose spans have at most `width` tokens.
            width: Tokens that each row reads. Those before its span go to the scratch slot.
            num_keys: Slots among which all spans end.
        """
        tail = 0 if self.is_autoregressive else self.layout.block_size
        offsets = torch.arange(tail - width, tail, device=self.rows.device)  # new: nothing else may free its memory
        states = self._read_rows(slice(0, num_rows), offsets, tail, num_keys, is_ragged=True, sees_everything=False)
        return self._predicting(states, num_rows)

    def _predicting(self, states: Float[Tensor, "b K D"] | None, num_rows: int) -> Float[Tensor, "b K D"]:
        """Returns the states that predict a block, from the states of its own positions."""
        if self.shift == 0:
            return states
        before = self.rows.clean_state
        if states is None:
            return before[:num_rows, None]
        if before is None:  # all rows are in their first block, whose first token is given
            return torch.cat([states[:, :1], states[:, :-1]], dim=1)
        return torch.cat([before[:num_rows, None], states[:, :-1]], dim=1)

    def _read(self, spans: list[range], tail: int) -> Float[Tensor, "b tail D"] | None:
        """Returns the states of the last `tail` positions of each span; the state before them goes to the rows."""
        batches = self._batches([len(span) for span in spans])
        if len(batches) == 1 and len(batches[0]) == len(spans):
            return self._read_batch(spans, slice(0, len(spans)), tail)
        found = None
        for batch in batches:
            index = torch.tensor(batch, device=self.rows.device)
            states = self._read_batch([spans[row] for row in batch], index, tail)
            if states is not None:
                found = states.new_zeros(len(spans), *states.shape[1:]) if found is None else found
                found[index] = states
        return found

    def _batches(self, widths: list[int]) -> list[list[int]]:
        """Groups rows by width, the widest first. Narrower rows are padded if that is cheaper than another call."""
        by_width = defaultdict(list)
        for row, width in enumerate(widths):
            if width:
                by_width[width].append(row)
        batches: list[list[int]] = []
        widest, left = 0, 0
        for width, rows in sorted(by_width.items(), reverse=True):
            padding = len(rows) * (widest - width)
            if batches and padding <= left:
                batches[-1] += rows
                left -= padding
            else:
                batches.append(list(rows))
                widest, left = width, self.free_padding
        return [sorted(batch) for batch in batches]

    def _read_batch(
        self, spans: list[range], index: slice | Int[Tensor, " b"], tail: int
    ) -> Float[Tensor, "b tail D"] | None:
        width, num_keys = max(map(len, spans)), max(span.stop for span in spans)
        is_ragged = any(len(span) != width for span in spans)
        sees_everything = self._sees_everything(spans, width, tail)
        offsets = self._offsets(tail - width, tail)
        return self._read_rows(index, offsets, tail, num_keys, is_ragged=is_ragged, sees_everything=sees_everything)

    def _read_rows(
        self,
        index: slice | Int[Tensor, " b"],
        offsets: Int[Tensor, " q"],
        tail: int,
        num_keys: int,
        *,
        is_ragged: bool,
        sees_everything: bool,
    ) -> Float[Tensor, "b tail D"] | None:
        """Runs one pass over tokens at `offsets` from the blocks' first. Tokens before a row's span are padding."""
        rows, width = self.rows, len(offsets)
        start = rows.start[index][:, None]
        slots = positions = start + offsets
        committed = None
        if is_ragged:
            committed = rows.committed[index][:, None]
            # A place without a row may stand after its old row's last block, where the cache has no slots.
            last_slot = self.cache.max_length - 1
            is_read = (positions >= committed) & (positions <= last_slot)
            slots = torch.where(is_read, positions, self.cache.scratch_slot)
            positions = positions.clamp(min=0, max=last_slot)
        is_visible = num_keys
        if not sees_everything:
            last = self._last_visible(positions, start, offsets, tail)
            is_visible = visible_by_layer(self.config, positions, last, num_keys)
        input_ids = self._input_ids(index, positions, width, tail)
        hidden = cached_forward(self.model, input_ids, positions, slots, is_visible, self.cache, index)
        if width > tail and self.shift == 1:
            has_read = None if committed is None else committed < start
            self._remember(index, hidden[:, width - tail - 1], has_read)
        return hidden[:, width - tail :] if tail else None

    def _offsets(self, first: int, end: int) -> Int[Tensor, " q"]:
        """Returns places relative to the first of the block."""
        if (first, end) not in self._known_offsets:
            if len(self._known_offsets) > NUM_KNOWN_OFFSETS:
                self._known_offsets.clear()
            self._known_offsets[first, end] = torch.arange(first, end, device=self.rows.device)
        return self._known_offsets[first, end]

    def _input_ids(
        self, index: slice | Int[Tensor, " b"], positions: Int[Tensor, "b q"], width: int, tail: int
    ) -> Int[Tensor, "b q"]:
        blocks = self.rows.block_ids[index]
        if width == tail:
            return blocks
        context = self.rows.ids[index].gather(1, positions[:, : width - tail])
        return torch.cat([context, blocks], dim=1) if tail else context

    def _sees_everything(self, spans: list[range], width: int, tail: int) -> bool:
        """Returns whether all rows read the same span, inside one block that reads all of itself: no mask needed."""
        first = spans[0]
        if any(span != first for span in spans) or width > self.layout.block_size:
            return False
        if tail == 0 and self.layout.causal_context and width > 1:
            return False
        return self.shortest_window is None or first.stop <= self.shortest_window

    def _last_visible(
        self, positions: Int[Tensor, "b q"], start: Int[Tensor, "b 1"], offsets: Int[Tensor, " q"], tail: int
    ) -> Int[Tensor, "b q"]:
        size = self.layout.block_size
        if not self.layout.causal_context:
            return (positions // size + 1) * size - 1
        return torch.where(offsets < 0, positions, start + tail - 1)

    def _remember(
        self, index: slice | Int[Tensor, " b"], states: Float[Tensor, "b D"], has_read: Bool[Tensor, "b 1"] | None
    ) -> None:
        """Stores the state of the last finished token of each row that has read one. None: of every row."""
        rows = self.rows
        if rows.clean_state is None:
            rows.clean_state = states.new_zeros(len(rows.start), states.shape[1])
        if has_read is not None:
            states = torch.where(has_read, states, rows.clean_state[index])
        rows.clean_state[index] = states
