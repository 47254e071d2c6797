"""Counts what a device would do, while functions run on tensors that have shapes and no numbers (`meta`)."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from decausal.devices import LAUNCH
from decausal.gpus import GPUS, Gpu

_NO_KERNEL = frozenset(
    {"_unsafe_view", "detach", "device", "empty", "empty_like", "empty_strided", "new_empty", "alias"}
)
_COUNTED_AS = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
_OF_ATTENTION = "attention"
_FLASH = "_scaled_dot_product_flash"
_READ_BY_INDEX = frozenset({"embedding", "gather", "index", "index_select"})
_WRITE_BY_INDEX = frozenset({"index_add_", "index_copy_", "index_put_", "scatter_"})


@dataclass
class Tally:
    """What a device would do.

    Attributes:
        matrix_operations: Operations of matrix products.
        attention_operations: Operations of attention on computed pairs, forward once and backward twice, as floors
            count them.
        num_bytes: Bytes read and written by all other kernels.
        matrix_bytes: Bytes read and written by matrix products.
        attention_bytes: Bytes read and written by attention.
        kernels: Number of kernels, by name. Views do not count.
        peak_bytes: The most bytes held at a time, of tensors made meanwhile.
    """

    matrix_operations: float = 0.0
    attention_operations: float = 0.0
    num_bytes: float = 0.0
    matrix_bytes: float = 0.0
    attention_bytes: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0

    @property
    def operations(self) -> float:
        """All operations."""
        return self.matrix_operations + self.attention_operations

    def seconds(self, launch: float = LAUNCH, gpu: Gpu = GPUS["h200"]) -> dict[str, float]:
        """Returns the time that this implies on a GPU.

        Matrix products and attention take the time of their operations or of their bytes, whichever is longer. All
        other kernels take the time of their bytes. The host's launches run beside them, and the slower of both counts.
        """
        parts = {
            "matrices": max(self.matrix_operations / gpu.matrix_rate, self.matrix_bytes / gpu.bandwidth),
            "attention": max(self.attention_operations / gpu.matrix_rate, self.attention_bytes / gpu.bandwidth),
            "elementwise": self.num_bytes / gpu.bandwidth,
            "launches": self.kernels.total() * launch,
        }
        device = parts["matrices"] + parts["attention"] + parts["elementwise"]
        return parts | {"total": max(device, parts["launches"])}


class Counting(TorchDispatchMode):
    """Fills a `Tally` while functions run on `meta`, or on tensors that claim to be on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self.live_bytes = 0
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
        self.tally.peak_bytes = max(self.tally.peak_bytes, self.live_bytes)
        return found

    def _add(self, function: Any, name: str, args: Any, kwargs: Any, found: Any, given: Any, made: Any) -> None:
        tally = self.tally
        tally.kernels[name] += 1
        moved = _moved(name, given, made)
        packet = _COUNTED_AS.get(function.overloadpacket, function.overloadpacket)
        if packet not in flop_registry:
            tally.num_bytes += moved
            return
        operations = flop_registry[packet](*args, **kwargs, out_val=found)
        if _OF_ATTENTION in name:
            # The registry counts that backward kernels compute the scores again, which floors do not, and all pairs
            # under a causal mask, of which FlashAttention computes half.
            half = 0.5 if name.startswith(_FLASH) and _is_causal(function, args, kwargs) else 1.0
            tally.attention_operations += operations * half * (0.8 if name.endswith("backward") else 1.0)
            tally.attention_bytes += moved
        else:
            tally.matrix_operations += operations
            tally.matrix_bytes += moved

    def _hold(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in given or id(storage) in self._known:
            return
        self._known.add(id(storage))
        self.live_bytes += storage.nbytes()
        weakref.finalize(storage, self._let_go, id(storage), storage.nbytes())

    def _let_go(self, identity: int, num_bytes: int) -> None:
        self._known.discard(identity)
        self.live_bytes -= num_bytes


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns all tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _moved(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Returns the bytes that a kernel reads and writes. Of an indexed tensor, only the picked part counts."""
    if name in _READ_BY_INDEX:
        given = [*given[1:], *made]
    elif name in _WRITE_BY_INDEX:
        given = made = given[1:]
    return sum(map(_nbytes, (*given, *made)))


def _is_causal(function: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal"))


def _nbytes(tensor: Tensor) -> int:
    """Returns the bytes that a kernel reads. Each byte of an expanded tensor counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 1]
    return tensor.element_size() * torch.Size(sizes).numel()


def _is_view(function: Any) -> bool:
    returned = [value.alias_info for value in function._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
