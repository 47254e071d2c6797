"""Which slots of a cache the queries of a pass read, as a dense mask or as FlexAttention's block mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig

from decausal.models.architecture import sliding_windows
from decausal.models.row_attention import FLEX

VisibleSlots = Bool[Tensor, "b q n"] | BlockMask
BLOCK = 128


def visible_by_layer(
    config: PretrainedConfig,
    position_ids: Int[Tensor, "b q"],
    last_visible: Int[Tensor, "b q"],
    num_keys: int,
) -> VisibleSlots | dict[str, VisibleSlots]:
    """Returns which slots each query reads: all up to `last_visible`, within the window in sliding-window layers.

    This is enough for block layouts. A token of an open block reads up to the end of its block. A finished token reads
    up to the end of its block, or up to itself under `causal_context`.

    A model that attends by FlexAttention gets block masks. From each row, attention then reads only as many slots as
    the row uses, and keys and values are not copied to all query heads.
    """
    windows = {
        kind: window if window is not None and window < num_keys else None
        for kind, window in sliding_windows(config).items()
    }
    make = _block_mask if config._attn_implementation == FLEX else _dense_mask
    by_window = {window: make(position_ids, last_visible, num_keys, window) for window in set(windows.values())}
    if len(by_window) == 1:
        return next(iter(by_window.values()))
    return {kind: by_window[window] for kind, window in windows.items()}


def _dense_mask(
    position_ids: Int[Tensor, "b q"], last_visible: Int[Tensor, "b q"], num_keys: int, window: int | None
) -> Bool[Tensor, "b q n"]:
    key = torch.arange(num_keys, device=position_ids.device)
    return _is_read(position_ids[..., None], last_visible[..., None], key, window)


def _block_mask(
    position_ids: Int[Tensor, "b q"], last_visible: Int[Tensor, "b q"], num_keys: int, window: int | None
) -> BlockMask:
    """Returns a mask whose blocks are counted from the rows' lengths, without a dense mask and without waiting."""
    num_rows, num_queries = last_visible.shape
    num_blocks = (-(-num_queries // BLOCK), -(-num_keys // BLOCK))
    longest = last_visible.amax(1).clamp(max=num_keys - 1) // BLOCK + 1
    block = torch.arange(num_blocks[1], dtype=torch.int32, device=last_visible.device)

    def is_visible(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _is_read(position_ids[row, query], last_visible[row, query], key, window)

    return BlockMask.from_kv_blocks(
        longest.to(torch.int32)[:, None, None].repeat(1, 1, num_blocks[0]),
        block.repeat(num_rows, 1, num_blocks[0], 1),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(num_queries, num_keys),
        compute_q_blocks=False,
    )


def _is_read(position: Tensor, last: Tensor, key: Tensor, window: int | None) -> Tensor:
    in_order = key <= last
    return in_order if window is None else in_order & ((position - key).abs() < window)
