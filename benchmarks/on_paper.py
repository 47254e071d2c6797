"""Steps and passes at full shape, counted on tensors without numbers: operations, bytes, kernels, memory, implied time.

Attention is computed by the kernels that CUDA would choose; nothing is timed here, and nothing needs a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from counting import tensors_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decausal.devices import BANDWIDTH, LAUNCH, MATRIX_RATE
from decausal.diffusion.layout import visible
from decausal.models.row_attention import FLEX, RowAttention

IN_A_GRAPH = 2e-6
"""Seconds between two kernels of a CUDA graph."""
BLOCK = 128
_NO_KERNEL = frozenset(
    {"_unsafe_view", "detach", "device", "empty", "empty_like", "empty_strided", "new_empty", "alias"}
)
_OF_ATTENTION = "attention"


@dataclass
class Tally:
    """What a device would do.

    Attributes:
        matrix_operations: Of matrix products.
        attention_operations: Of attention, computed pairs, forward once and backward twice, as floors count them.
        num_bytes: Read and written by kernels other than these two.
        matrix_bytes: The same of matrix products.
        kernels: By name; views are none.
        peak_bytes: Most that was held at a time of what was made meanwhile.
    """

    matrix_operations: float = 0.0
    attention_operations: float = 0.0
    num_bytes: float = 0.0
    matrix_bytes: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0

    @property
    def operations(self) -> float:
        """All of them."""
        return self.matrix_operations + self.attention_operations

    def seconds(self, launch: float = LAUNCH) -> dict[str, float]:
        """Implied time: matrices and attention at `MATRIX_RATE` or `BANDWIDTH`, whichever is slower, the rest at
        `BANDWIDTH`; the host's launches run beside them, and the slower of both counts."""
        matrices = max(self.matrix_operations / MATRIX_RATE, self.matrix_bytes / BANDWIDTH)
        parts = {
            "matrices": matrices,
            "attention": self.attention_operations / MATRIX_RATE,
            "elementwise": self.num_bytes / BANDWIDTH,
            "launches": self.kernels.total() * launch,
        }
        device = parts["matrices"] + parts["attention"] + parts["elementwise"]
        return parts | {"total": max(device, parts["launches"])}


class Counting(TorchDispatchMode):
    """Fills a `Tally` while functions run on `meta`, or on tensors that claim to be on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        known = {id(tensor.untyped_storage()) for tensor in given}
        found = function(*args, **kwargs)
        made = tensors_of(found)
        name = function.overloadpacket.__name__
        if name not in _NO_KERNEL and not _is_view(function):
            self._add(function, name, args, kwargs, found, given, made)
        for tensor in made:
            self._hold(tensor, known)
        self.tally.peak_bytes = max(self.tally.peak_bytes, self._live)
        return found

    def _add(self, function: Any, name: str, args: Any, kwargs: Any, found: Any, given: Any, made: Any) -> None:
        tally = self.tally
        tally.kernels[name] += 1
        moved = sum(_nbytes(tensor) for tensor in (*given, *made))
        packet = function.overloadpacket
        if packet not in flop_registry:
            tally.num_bytes += moved
            return
        operations = flop_registry[packet](*args, **kwargs, out_val=found)
        if _OF_ATTENTION in name:
            # The registry counts that backward kernels compute the scores again; floors do not.
            tally.attention_operations += operations * (0.8 if name.endswith("backward") else 1.0)
        else:
            tally.matrix_operations += operations
            tally.matrix_bytes += moved

    def _hold(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in given or id(storage) in self._known:
            return
        self._known.add(id(storage))
        self._live += storage.nbytes()
        weakref.finalize(storage, self._let_go, id(storage), storage.nbytes())

    def _let_go(self, identity: int, num_bytes: int) -> None:
        self._known.discard(identity)
        self._live -= num_bytes


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads: of an expanded tensor each once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 1]
    return tensor.element_size() * torch.Size(sizes).numel()


def _is_view(function: Any) -> bool:
    returned = [value.alias_info for value in function._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


class GpuAttention(TorchFunctionMode):
    """Scaled dot-product attention by the kernels that CUDA has: without a mask one, with a mask another."""

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
    """FlexAttention on tensors without numbers, where `pairs` of all rows' queries and keys are computed.

    Its masks are made of numbers, so the pairs are counted beforehand, by `pairs_of`.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        operations = 4.0 * pairs * query.shape[1] * query.shape[3]
        return _Flex.apply(query, key, value, counting.tally, operations).transpose(1, 2), None

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
        tally.kernels["flex_attention"] += 1
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = context.saved_tensors
        context.tally.attention_operations += 2 * context.operations
        context.tally.kernels["flex_attention_backward"] += 2
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def pairs_of(rows: RowAttention, *, in_blocks: bool) -> float:
    """How many pairs of query and key the rows read; in blocks: how many FlexAttention computes, 128 x 128 at a time.

    Rows are on the CPU.
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
    """Returns what a function would have a GPU do."""
    counting = Counting()
    if flex_pairs is None:
        with GpuAttention(), counting:
            function()
    else:
        with flex_attention_counted(counting, flex_pairs), counting:
            function()
    return counting.tally
