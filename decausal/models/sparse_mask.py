"""Attention that skips what no query reads, for dense masks on a CPU, where FlexAttention has no backward pass.

PyTorch's attention computes every pair of a dense mask, hidden or not. In packed and doubled rows most pairs are
hidden, in long stretches. So the queries are taken in chunks, each with the keys that any query of the chunk reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention

# The best of 64, 128 and 256, or close to it, for causal, doubled and packed rows of 400 to 1024 tokens on one thread.
CHUNK = 128
WORTHWHILE = 0.8
"""A finer division is used if it has at most this share of the pairs of the coarser one."""


@dataclass(frozen=True)
class Chunk:
    """Some queries of some rows, and the keys that they read.

    Attributes:
        rows: Which rows.
        queries: Which of their queries.
        keys: The keys that any of these reads; a slice if they are contiguous.
        mask: Which query reads which of these keys.
    """

    rows: slice
    queries: slice
    keys: slice | Int[Tensor, " n"]
    mask: Bool[Tensor, "b 1 q n"]

    def of_queries(self, states: Float[Tensor, "B H S d"]) -> Float[Tensor, "b H q d"]:
        """Returns the chunk's part of states by query, as a view."""
        return states[self.rows, :, self.queries]

    def of_keys(self, states: Float[Tensor, "B H S d"]) -> Float[Tensor, "b H n d"]:
        """Returns the chunk's part of states by key."""
        rows = states[self.rows]
        return rows[:, :, self.keys] if isinstance(self.keys, slice) else rows.index_select(2, self.keys)

    def add_to_keys(self, states: Float[Tensor, "B H S d"], part: Float[Tensor, "b H n d"]) -> None:
        """Adds to what `of_keys` gives, in place."""
        rows = states[self.rows]
        if isinstance(self.keys, slice):
            rows[:, :, self.keys] += part
        else:
            rows.index_add_(2, self.keys, part)


class SparseMask(Tensor):
    """A boolean mask [B, 1, S, S] under which `scaled_dot_product_attention` computes chunk by chunk.

    For everything else it is the dense mask that it was made from, and results of operations are ordinary tensors.
    """

    chunks: list[Chunk]

    @staticmethod
    def of(mask: Bool[Tensor, "B 1 q n"]) -> Tensor:
        """Returns the mask in this form if that saves enough, else unchanged."""
        if mask.device.type != "cpu" or mask.shape[2] <= CHUNK:
            return mask
        chunks = _chunks(mask)
        if not chunks:
            return mask
        sparse = torch.Tensor._make_subclass(SparseMask, mask)
        sparse.chunks = chunks
        return sparse

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is scaled_dot_product_attention and _is_plain(*args, **kwargs):
                states = map(_autocast, args[:3])
                return _ChunkedAttention.apply(*states, kwargs["attn_mask"].chunks, kwargs.get("scale"))
            return function(*args, **kwargs)


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Returns whether PyTorch's CPU kernel computes this call, and only the mask restricts attention."""
    is_same_shape = query.shape[-1] == value.shape[-1] and query.shape[1] == key.shape[1]
    return isinstance(attn_mask, SparseMask) and dropout_p == 0.0 and is_same_shape and query.device.type == "cpu"


def _autocast(states: Tensor) -> Tensor:
    """Computes in the dtype that autocast would use for attention, which it recognises by the function's name."""
    if not torch.is_autocast_enabled("cpu") or states.dtype == torch.float64:
        return states
    return states.to(torch.get_autocast_dtype("cpu"))


class _ChunkedAttention(torch.autograd.Function):
    """Computes what PyTorch's CPU kernel computes, chunk by chunk. Backward keeps the whole inputs and outputs, no
    copies."""

    @staticmethod
    def forward(
        context: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, chunks: Sequence[Chunk], scale: float | None
    ) -> Tensor:
        # [B, S, H, d] in memory, as attention's output is read next
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        log_sums = []
        for chunk in chunks:
            states, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                chunk.of_queries(query),
                chunk.of_keys(key),
                chunk.of_keys(value),
                attn_mask=_added(chunk.mask, query.dtype),
                scale=scale,
            )
            chunk.of_queries(output).copy_(states)
            log_sums.append(log_sum)
        context.save_for_backward(query, key, value, output, *log_sums)
        context.chunks, context.scale = chunks, scale
        return output

    @staticmethod
    def backward(context: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *log_sums = context.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for chunk, log_sum in zip(context.chunks, log_sums, strict=True):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                chunk.of_queries(gradient),
                chunk.of_queries(query),
                chunk.of_keys(key),
                chunk.of_keys(value),
                chunk.of_queries(output),
                log_sum,
                0.0,
                False,
                attn_mask=_added(chunk.mask, query.dtype),
                scale=context.scale,
            )
            chunk.of_queries(of_query).copy_(parts[0])
            chunk.add_to_keys(of_key, parts[1])
            chunk.add_to_keys(of_value, parts[2])
        return of_query, of_key, of_value, None, None


def _added(mask: Bool[Tensor, "b 1 q n"], dtype: torch.dtype) -> Float[Tensor, "b 1 q n"]:
    """Returns the mask in the kernel's form, which is added to the scores."""
    return torch.zeros((), dtype=dtype).where(mask, -torch.inf)


def _chunks(mask: Bool[Tensor, "B 1 q n"]) -> list[Chunk]:
    """Returns chunks of all rows together, or of each row alone, which may hold other documents; none if neither pays
    off."""
    num_rows, num_queries = mask.shape[0], mask.shape[2]
    starts = range(0, num_queries, CHUNK)
    is_read = np.logical_or.reduceat(mask[:, 0].numpy(), starts, axis=1)
    together, apart = [slice(0, num_rows)], [slice(row, row + 1) for row in range(num_rows)]
    best: list[Chunk] = []
    least = mask.numel()
    for groups in (together, apart):
        parts = [
            (rows, slice(start, min(start + CHUNK, num_queries)), is_read[rows, number].any(axis=0).nonzero()[0])
            for rows in groups
            for number, start in enumerate(starts)
        ]
        num_pairs = sum(_size(rows) * _size(queries) * len(keys) for rows, queries, keys in parts)
        if num_pairs <= WORTHWHILE * least:
            best, least = [_chunk(mask, *part) for part in parts], num_pairs
    return best


def _size(part: slice) -> int:
    return part.stop - part.start


def _chunk(mask: Bool[Tensor, "B 1 q n"], rows: slice, queries: slice, index: NDArray[np.intp]) -> Chunk:
    first, end = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 1)
    keys = slice(first, end) if len(index) in (0, end - first) else torch.from_numpy(index)
    return Chunk(rows, queries, keys, mask[rows, :, queries][..., keys].contiguous())
