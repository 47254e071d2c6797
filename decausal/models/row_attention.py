"""Who attends to whom in given rows, as a dense mask or as FlexAttention's block mask, from one rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from decausal.diffusion.layout import Layout, attention_mask, visible

FLEX = "flex_attention"


@dataclass(frozen=True)
class RowAttention:
    """A layout applied to rows.

    Attributes:
        layout: Who attends to whom.
        document_ids: Document of each token, -1 for padding.
        position_ids: Positions inside the documents.
        stream_ids: Streams of doubled rows, see `decausal.diffusion.layout.visible`.
        future: (future_order, future_fraction) of `decausal.diffusion.layout.attention_mask`.
    """

    layout: Layout
    document_ids: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    stream_ids: Int[Tensor, "B T"] | None = None
    future: tuple[Float[Tensor, "S S"], float] | None = None

    def dense_mask(self, window: int | None) -> Bool[Tensor, "B 1 T T"]:
        """Returns the mask of layers with this sliding window, True where a query reads a key."""
        order, fraction = self.future if self.future is not None else (None, None)
        return attention_mask(
            self.layout, self.document_ids, self.position_ids, window, order, fraction, self.stream_ids
        )

    def block_mask(self, window: int | None) -> BlockMask:
        """Returns the same for FlexAttention, which skips what no query reads and never builds [T, T] while it
        attends."""
        device = self.document_ids.device
        num_rows, length = self.document_ids.shape
        # When compiled, the whole mask is never in memory while its blocks are found. On a CPU the compiler costs more.
        return create_block_mask(
            self._mask_function(window), num_rows, None, length, length, device, _compile=device.type == "cuda"
        )

    def _mask_function(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Returns the rule for one element of the mask.

        Compiled attention recompiles if the code or a plain value of a mask function changes, but not for other
        tensors. So everything that differs between steps is a tensor.
        """
        layout, documents, positions, streams = self.layout, self.document_ids, self.position_ids, self.stream_ids
        order, fraction = self.future if self.future is not None else (None, None)
        open_below = None if order is None else torch.full((), fraction, device=documents.device)

        def is_visible(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query_position, key_position = positions[row, query], positions[row, key]
            query_stream, key_stream = (None, None) if streams is None else (streams[row, query], streams[row, key])
            found = visible(
                layout,
                query_position,
                key_position,
                documents[row, query],
                documents[row, key],
                window,
                query_stream,
                key_stream,
            )
            if order is not None:
                found = found & ((key_position <= query_position) | (order[query, key] < open_below))
            return found

        return is_visible
