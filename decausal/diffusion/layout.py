"""Attention layouts: which tokens may read which others.

Every rule compares positions and document ids. So one function serves the dense masks of SDPA and eager attention and
the `mask_mod` of FlexAttention.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.diffusion.layout_kinds import Layout as Layout  # users import it from here


def visible(
    layout: Layout,
    query_position: Int[Tensor, "..."],
    key_position: Int[Tensor, "..."],
    query_document: Int[Tensor, "..."],
    key_document: Int[Tensor, "..."],
    window: int | None = None,
    query_stream: Int[Tensor, "..."] | None = None,
    key_stream: Int[Tensor, "..."] | None = None,
) -> Bool[Tensor, "..."]:
    """Returns whether each query may read each key. Elementwise: the tensors broadcast against each other.

    A row of block layout may hold several streams: the clean tokens, and noised copies of them at the same positions. A
    noised token reads its block in its own stream, and the clean tokens of earlier blocks. A clean token only reads
    clean ones. Without streams everything is one clean stream. In a row of causal layout the streams are branches:
    continuations of stream 0 that see what precedes them in it, and not each other.

    Documents never see each other. Padding is a document too (id -1): padding reads padding, because softmax turns a
    query without a key into NaN.

    A sliding window W keeps the layer's reach backward (``q - k < W``) and mirrors it forward. So a causal layout gives
    exactly the source model's window. A bidirectional layout sees exactly the distances the layer was trained on, on
    both sides.

    Args:
        layout: The layout.
        query_position: Positions inside the query's document. They restart at 0 in each document, because blocks lie on
            a grid that starts with the document.
        key_position: Positions inside the key's document.
        query_document: Document ids, -1 for padding.
        key_document: Document ids, -1 for padding.
        window: W of a sliding-window layer, in tokens; None if a layer reads everything. Distances are between
            positions, whatever the streams.
        query_stream: 0 for clean queries, s >= 1 for those of the s-th noised copy, -1 for padding.
        key_stream: The same for the keys; given together with `query_stream`, and not for bidirectional layouts.
    """
    if (query_stream is None) != (key_stream is None) or (query_stream is not None and layout.kind == "bidirectional"):
        raise ValueError("streams are given for queries and keys together, and not for bidirectional layouts")
    is_visible = query_document == key_document
    if layout.kind == "causal":
        is_visible = is_visible & (key_position <= query_position)
        if query_stream is not None and key_stream is not None:
            is_visible = is_visible & ((key_stream == 0) | (key_stream == query_stream))
    elif layout.kind == "block":
        is_visible = is_visible & _in_block_order(layout, query_position, key_position, query_stream, key_stream)
    if window is not None:
        is_visible = is_visible & ((query_position - key_position).abs() < window)
    return is_visible


def _in_block_order(
    layout: Layout,
    query_position: Int[Tensor, "..."],
    key_position: Int[Tensor, "..."],
    query_stream: Int[Tensor, "..."] | None,
    key_stream: Int[Tensor, "..."] | None,
) -> Bool[Tensor, "..."]:
    assert layout.block_size is not None
    query_block, key_block = query_position // layout.block_size, key_position // layout.block_size
    clean_reads_clean = key_position <= query_position if layout.causal_context else key_block <= query_block
    if query_stream is None:
        return clean_reads_clean
    is_clean_query = query_stream == 0
    reads_clean = (is_clean_query & clean_reads_clean) | (~is_clean_query & (key_block < query_block))
    reads_own_stream = (query_stream == key_stream) & (key_block == query_block)
    if layout.causal_groups:
        reads_own_stream = reads_own_stream & (key_position <= query_position)
    return ((key_stream == 0) & reads_clean) | ((key_stream != 0) & reads_own_stream)


def attention_mask(
    layout: Layout,
    document_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    window: int | None = None,
    future_order: Float[Tensor, "S S"] | None = None,
    future_fraction: float | None = None,
    stream_ids: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B 1 T T"]:
    """Returns the dense attention mask: True where a query (third axis) reads a key (fourth axis), for any number of
    heads.

    Attention can be annealed from causal to `layout`. Of the pairs that look ahead, those with `future_order` below
    `future_fraction` are open. The order is fixed, so an open pair stays open as the fraction grows.

    Args:
        layout: The layout, or the one that annealing ends in.
        document_ids: Document of each token, -1 for padding.
        position_ids: Position of each token in its document, from 0 (`positions_in_documents`).
        window: Sliding window in tokens, see `visible`.
        future_order: Values in [0, 1) from `future_order`, for at least T positions, indexed by places in the row.
        future_fraction: In [0, 1]; 0 is causal, 1 is `layout`. Given together with `future_order`, or not at all.
        stream_ids: Stream of each token, for rows that hold noised copies; see `visible`.

    Source: attention mask annealing, DiffuLLaMA (arXiv 2410.17891, section 3). There each step draws its open pairs
    again.
    """
    if (future_order is None) != (future_fraction is None):
        raise ValueError("future_order and future_fraction are given together or not at all")
    query_position, key_position = position_ids[:, :, None], position_ids[:, None, :]
    query_stream, key_stream = (None, None) if stream_ids is None else (stream_ids[:, :, None], stream_ids[:, None, :])
    is_visible = visible(
        layout,
        query_position,
        key_position,
        document_ids[:, :, None],
        document_ids[:, None, :],
        window,
        query_stream,
        key_stream,
    )
    if future_order is not None and future_fraction is not None:
        length = document_ids.shape[1]
        is_open = future_order[:length, :length] < future_fraction
        is_visible = is_visible & ((key_position <= query_position) | is_open)
    return is_visible[:, None]


def future_order(length: int, seed: int, device: torch.device | str = "cpu") -> Float[Tensor, "T T"]:
    """Returns the fixed random order, uniform in [0, 1), in which annealing opens the pairs that look ahead.

    It is a function of `length` and `seed`, drawn on the CPU from a separate generator. So every process, device and
    resumed run has the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(length, length, generator=generator).to(device)


def is_packed(document_ids: Int[Tensor, "B T"]) -> bool:
    """Returns whether any row is not one whole document without padding. If none is, attention needs no explicit
    mask."""
    return bool((document_ids != 0).any())


def positions_in_documents(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Returns the position of each token in its document: 0, 1, 2, ... from wherever the id changes, padding
    included."""
    row_position = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first_position = torch.where(is_first, row_position, 0).cummax(dim=1).values
    return row_position - first_position


def block_numbers(document_ids: Int[Tensor, "B T"], block_size: int) -> Int[Tensor, "B T"]:
    """Returns the number of each token's block among those of its row: 0, 1, ...; -1 for padding."""
    is_real = document_ids >= 0
    is_first = is_real & (positions_in_documents(document_ids) % block_size == 0)
    return torch.where(is_real, is_first.long().cumsum(dim=1) - 1, -1)
