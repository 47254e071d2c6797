"""Computes, on tensors without numbers, attention by a GPU's kernels and products in the type of autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decausal.diffusion.layout import visible
from decausal.models.row_attention import FLEX, RowAttention
from decausal.training.planning.tally import Counting, Tally

BLOCK = 128
_IN_LOWER = frozenset(
    {
        torch.addmm,
        torch.bmm,
        torch.einsum,
        torch.matmul,
        torch.mm,
        torch.nn.functional.linear,
        torch.nn.functional.scaled_dot_product_attention,
        Tensor.__matmul__,
        Tensor.bmm,
        Tensor.matmul,
        Tensor.mm,
    }
)


class MixedPrecision(TorchFunctionMode):
    """Computes matrix products and attention in a lower type, as autocast does, which does not support `meta` tensors.

    As with autocast, each trained weight is converted once, and the copies live as long as the pass needs them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._weights: dict[int, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that were converted."""
        return sum(weight.nbytes for weight in self._weights.values())

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _IN_LOWER:
            args, kwargs = tree_map(self._lowered, (args, kwargs))
        return function(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(self._dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(self._dtype)
        return self._weights[id(value)]


class GpuAttention(TorchFunctionMode):
    """Scaled dot-product attention by CUDA's kernels: one without a mask, another with a mask."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = args[:3]
        mask, scale = kwargs.get("attn_mask"), kwargs.get("scale")
        if mask is None:
            is_causal = kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
        assert mask.is_floating_point(), "a boolean mask is turned into one that is added, in every layer"
        mask = mask.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, scale=scale)[0]


@contextmanager
def flex_attention_counted(counting: Counting, pairs: float) -> Iterator[None]:
    """Runs FlexAttention on tensors without numbers, where `pairs` of all rows' queries and keys are computed.

    Its masks are made of numbers, so the pairs are counted beforehand, by `pairs_of`.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        operations = 4.0 * pairs * query.shape[1] * query.shape[3]
        states = (part.to(value.dtype) for part in (query, key, value))  # as autocast does
        return _Flex.apply(*states, counting.tally, operations).transpose(1, 2), None

    def mask_of(rows: RowAttention, _: Any) -> Tensor:
        return rows.document_ids.new_empty(1, 1, 1, 1, dtype=torch.bool)

    before = ALL_ATTENTION_FUNCTIONS[FLEX], RowAttention.block_mask
    ALL_ATTENTION_FUNCTIONS[FLEX], RowAttention.block_mask = attend, mask_of  # type: ignore[method-assign]
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[FLEX], RowAttention.block_mask = before  # type: ignore[method-assign]


class _Flex(torch.autograd.Function):
    """Makes and keeps what FlexAttention makes and keeps: one kernel forward, two backward."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, tally: Tally, operations: float) -> Tensor:
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, log_sums)
        context.tally, context.operations = tally, operations
        tally.attention_operations += operations
        tally.attention_bytes += sum(part.nbytes for part in (query, key, value, output))
        tally.kernels["flex_attention"] += 1
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = context.saved_tensors
        context.tally.attention_operations += 2 * context.operations
        context.tally.attention_bytes += 2 * sum(part.nbytes for part in context.saved_tensors)
        context.tally.kernels["flex_attention_backward"] += 2
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def pairs_of(rows: RowAttention, *, in_blocks: bool) -> float:
    """Returns how many pairs of query and key the rows read.

    Args:
        rows: Rows on the CPU.
        in_blocks: Instead, how many FlexAttention computes, 128 x 128 at a time.
    """
    total, (_, length) = 0.0, rows.document_ids.shape
    blocks = -(-length // BLOCK)
    for start in range(0, length, BLOCK):
        here = slice(start, start + BLOCK)
        stream = rows.stream_ids
        seen = visible(
            rows.layout,
            rows.position_ids[:, here, None],
            rows.position_ids[:, None],
            rows.document_ids[:, here, None],
            rows.document_ids[:, None],
            None,
            None if stream is None else stream[:, here, None],
            None if stream is None else stream[:, None],
        )
        if in_blocks:
            padded = torch.nn.functional.pad(seen.any(1), (0, blocks * BLOCK - length))
            total += float(padded.unflatten(1, (blocks, BLOCK)).any(2).sum()) * BLOCK * BLOCK
        else:
            total += float(seen.sum())
    return total


def counted(function: Callable[[], Any], *, flex_pairs: float | None = None) -> Tally:
    """Counts what a GPU would do to run a function."""
    counting = Counting()
    if flex_pairs is None:
        with GpuAttention(), counting:
            function()
    else:
        with flex_attention_counted(counting, flex_pairs), counting:
            function()
    return counting.tally
