"""Peak memory and waits of the host for the device, counted while a function runs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result the host needs before it can go on; on a GPU each is a synchronisation.
_HOST_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Returns the most memory that `function` held at a time beyond what was there before.

    CUDA: as the caching allocator counts it. CPU: bytes of live tensors, seen after each operator; an operator's own
    scratch space is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        function()
    return live.peak


def host_waits(function: Callable[[], Any], device: torch.device) -> int:
    """Returns how often the host waits for the device in `function`.

    CUDA: synchronising calls, as PyTorch reports them. CPU: operators that would be one on a GPU; copies from
    unpinned memory, which also wait there, are not seen.
    """
    if device.type == "cuda":
        return _cuda_synchronisations(function)
    with _HostReads() as reads:
        function()
    return reads.count


def _cuda_synchronisations(function: Callable[[], Any]) -> int:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(warning.message) for warning in caught)


class _LiveTensors(TorchDispatchMode):
    """Sums the storages that operators make, from the operator to the release of the last tensor on it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._known:
                self._add(storage)
        self.peak = max(self.peak, self._live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(id(storage))
        self._live += storage.nbytes()
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, identity: int, num_bytes: int) -> None:
        self._known.discard(identity)
        self._live -= num_bytes


class _HostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in _HOST_READS
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
