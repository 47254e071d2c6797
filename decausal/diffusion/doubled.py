"""The training row of block layouts, ``[clean | noised_1 | ... | noised_K]``: one forward for all blocks of all views.

A block is denoised in the context of finished blocks. To train on all blocks at once, a row holds its clean tokens
once. After them, for each noised view, come copies of the needed blocks at the same positions. Attention by streams
(`decausal.diffusion.layout.visible`) gives each copy exactly what it would read at decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.diffusion.layout import block_numbers, positions_in_documents


@dataclass(frozen=True)
class Doubled:
    """Rows of clean tokens and noised blocks, padded to the longest.

    R is B, or less if rows are joined.

    Attributes:
        ids: What the model reads: clean tokens, then the views' blocks, in which masked tokens and fills are masks.
        document_ids: -1 for padding.
        position_ids: Noised copies have the positions of the clean tokens. Padding has positions below T.
        stream_ids: 0 for clean tokens, s for the s-th view, -1 for padding.
        source_index: Flat index into [B*T] of the clean token at each place, or under its mask; -1 for masks that fill
            a document's last block, and for padding.
        places: Flat index into [R*S] of each clean token in each stream; -1 if the stream does not hold it.
        is_block_start: Clean tokens that begin a block.
    """

    ids: Int[Tensor, "R S"]
    document_ids: Int[Tensor, "R S"]
    position_ids: Int[Tensor, "R S"]
    stream_ids: Int[Tensor, "R S"]
    source_index: Int[Tensor, "R S"]
    places: Int[Tensor, "B streams T"]
    is_block_start: Bool[Tensor, "B T"]

    def place_of(self, stream: Int[Tensor, " n"] | int, token_index: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns the flat indices into [R*S] of clean tokens (flat indices into [B*T]) in a stream: 0, or s for the
        s-th view."""
        _, num_streams, length = self.places.shape
        row, column = token_index // length, token_index % length
        return self.places.reshape(-1)[(row * num_streams + stream) * length + column]

    def predicting_place(
        self, stream: Int[Tensor, " n"] | int, token_index: Int[Tensor, " n"], shift: int
    ) -> Int[Tensor, " n"]:
        """Returns the flat index into [R*S] of the state that predicts each token of a noised stream.

        Shift 0: the token's own state. Shift 1: the state before it in its own stream, if that belongs to its block.
        Before a block's first token it is the clean stream's state, which has read exactly the earlier blocks. So shift
        1 with blocks of one token is the autoregressive model.
        """
        if shift == 0:
            return self.place_of(stream, token_index)
        is_first = self.is_block_start.reshape(-1)[token_index]
        return self.place_of(torch.where(is_first, 0, stream), token_index - 1)


def needs_copy(
    is_masked: Bool[Tensor, "B K T"], is_block_start: Bool[Tensor, "B T"], shift: int
) -> Bool[Tensor, "B K T"]:
    """Returns targets that a state of their noised block predicts: with shift 1, all except a block's first token."""
    return is_masked if shift == 0 else is_masked & ~is_block_start[:, None]


def block_starts(document_ids: Int[Tensor, "B T"], block_size: int) -> Bool[Tensor, "B T"]:
    """Returns the tokens that begin a block, without padding."""
    return (document_ids >= 0) & (positions_in_documents(document_ids) % block_size == 0)


def double(
    clean_ids: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    is_noised: Bool[Tensor, "B T"] | Bool[Tensor, "B K T"],
    is_masked: Bool[Tensor, "B K T"],
    mask_token_id: int,
    block_size: int,
    context_length: int | None = None,
    row_multiple: int = 1,
) -> Doubled:
    """Builds the rows of K noised views.

    A view holds only whole blocks with an `is_noised` token, so a prompt costs its tokens once. A document's last block
    is filled with masks, which are never targets, because blocks are whole at decoding too.

    Args:
        clean_ids: Packed rows.
        document_ids: Document of each token, -1 for padding, which is left out.
        is_noised: Tokens whose block gets a copy, in every view or separately for each.
        is_masked: Tokens that are masks in each view. Those in blocks without a copy have no effect.
        mask_token_id: Stands for masked tokens, fills and padding.
        block_size: Tokens per block; the grid starts with each document.
        context_length: Number of the model's positions. Fills beyond it are left out. None: no limit.
        row_multiple: Rows are padded to a multiple of this.
    """
    num_rows, views, length = is_masked.shape
    is_real = document_ids >= 0
    position_ids = positions_in_documents(document_ids)
    is_held = _whole_blocks(is_noised, document_ids, block_size).expand(num_rows, views, length)
    is_held = torch.cat([is_real[:, None], is_held], dim=1)
    num_entries = is_held.long()
    num_entries[:, 1:] *= 1 + _num_fills(document_ids, position_ids, block_size, context_length)[:, None]

    # Entries are in order of row, stream and token. The fills of its block follow a document's last token.
    of_row = num_entries.reshape(num_rows, -1)
    start = (of_row.cumsum(dim=1) - of_row).reshape_as(num_entries)
    flat = torch.arange(num_entries.numel(), device=clean_ids.device).repeat_interleave(num_entries.reshape(-1))
    row, stream, column = flat // ((views + 1) * length), flat // length % (views + 1), flat % length
    token = row * length + column
    in_rows = torch.arange(len(flat), device=clean_ids.device)
    row_start = of_row.sum(dim=1).cumsum(dim=0) - of_row.sum(dim=1)
    place_in_row = in_rows - row_start[row]
    fill = place_in_row - start.reshape(-1)[flat]  # 0 for the token itself
    row_length = -(-max(int(of_row.sum(dim=1).max()), 1) // row_multiple) * row_multiple
    place = row * row_length + place_in_row

    is_mask = torch.cat([torch.zeros_like(is_real)[:, None], is_masked], dim=1).reshape(-1)[flat] | (fill > 0)

    def rows_of(values: Tensor, padding: int | Tensor) -> Tensor:
        padded = torch.zeros(num_rows, row_length, dtype=values.dtype, device=values.device) + padding
        return padded.reshape(-1).scatter(0, place, values).reshape(num_rows, row_length)

    row_index = torch.arange(num_rows, device=clean_ids.device)[:, None, None]
    return Doubled(
        ids=rows_of(torch.where(is_mask, mask_token_id, clean_ids.reshape(-1)[token]), mask_token_id),
        document_ids=rows_of(document_ids.reshape(-1)[token], -1),
        position_ids=rows_of(
            position_ids.reshape(-1)[token] + fill, torch.arange(row_length, device=clean_ids.device) % length
        ),
        stream_ids=rows_of(stream, -1),
        source_index=rows_of(torch.where(fill == 0, token, -1), -1),
        places=torch.where(is_held, row_index * row_length + start, -1),
        is_block_start=block_starts(document_ids, block_size),
    )


def joined(rows: Doubled, row_length: int = 512) -> Doubled:
    """Returns rows laid end to end in fewer rows of about `row_length` tokens, or of the longest, with little padding.

    Their documents stay apart. Clean tokens keep their indices into [B*T].
    """
    is_real = rows.stream_ids >= 0
    num_rows, longest = is_real.shape
    lengths = is_real.sum(dim=1).tolist()
    row, start, length = _balanced(lengths, max(1, -(-sum(lengths) // max(longest, row_length))))
    new_place = (row * length + start).to(is_real.device)[:, None] + torch.arange(longest, device=is_real.device)
    num_joined = int(row.max()) + 1

    def laid(values: Tensor, padding: Tensor | int) -> Tensor:
        padded = torch.zeros(num_joined, length, dtype=values.dtype, device=values.device) + padding
        return padded.reshape(-1).scatter(0, new_place[is_real], values[is_real]).reshape(num_joined, length)

    return replace(
        rows,
        ids=laid(rows.ids, 0),
        document_ids=laid(rows.document_ids + longest * torch.arange(num_rows, device=is_real.device)[:, None], -1),
        position_ids=laid(rows.position_ids, torch.arange(length, device=is_real.device) % rows.places.shape[2]),
        stream_ids=laid(rows.stream_ids, -1),
        source_index=laid(rows.source_index, -1),
        places=torch.where(rows.places < 0, -1, new_place.reshape(-1)[rows.places.clamp(min=0)]),
    )


def _balanced(lengths: Sequence[int], num_rows: int) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], int]:
    """Returns the row and the start of each piece, and the longest row: each piece joins the shortest row so far, the
    longest piece first."""
    row, start = torch.zeros(len(lengths), dtype=torch.int64), torch.zeros(len(lengths), dtype=torch.int64)
    used = [0] * num_rows
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        shortest = used.index(min(used))
        row[index], start[index] = shortest, used[shortest]
        used[shortest] += lengths[index]
    return row, start, max(*used, 1)


def _whole_blocks(
    is_noised: Bool[Tensor, "B T"] | Bool[Tensor, "B K T"], document_ids: Int[Tensor, "B T"], block_size: int
) -> Bool[Tensor, "B K T"]:
    """Returns all tokens of the blocks that hold a token of `is_noised`."""
    is_noised = is_noised if is_noised.dim() == 3 else is_noised[:, None]
    number = block_numbers(document_ids, block_size)[:, None].expand_as(is_noised)
    is_real = number >= 0
    number = number.clamp(min=0)
    in_block = torch.zeros_like(is_noised, dtype=torch.int64)
    in_block.scatter_add_(2, number, (is_noised & is_real).long())
    return (in_block.gather(2, number) > 0) & is_real


def _num_fills(
    document_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"], block_size: int, context_length: int | None
) -> Int[Tensor, "B T"]:
    """Returns how many masks follow each token: what a document's last block lacks, as far as the context reaches."""
    is_last = torch.ones_like(document_ids, dtype=torch.bool)
    is_last[:, :-1] = document_ids[:, :-1] != document_ids[:, 1:]
    num_fills = block_size - 1 - position_ids % block_size
    if context_length is not None:
        num_fills = num_fills.minimum((context_length - 1 - position_ids).clamp(min=0))
    return torch.where(is_last & (document_ids >= 0), num_fills, 0)
