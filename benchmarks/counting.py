"""What a GPU would be asked to do, counted where there is none: on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.training.planning.tally import tensors_of


class OneDevice(TorchDispatchMode):
    """Refuses operators that would fail or wait on a GPU: tensors of several devices, and numbers wanted on the host.

    On a GPU a tensor from elsewhere is an error, or a copy that the host waits for. A single number of the host may
    meet numbers of the device, as it may there. On `meta` a look at a value raises by itself.

    Attributes:
        device: The one.
        operators: How often each was called.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operators: Counter[str] = Counter()
        self._made = _NothingMadeOfNumbers(device)

    def __enter__(self) -> Self:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        for tensor in tensors_of((args, kwargs)):
            if tensor.device.type != self.device.type and (tensor.dim() or name in ("_to_copy", "copy_")):
                raise AssertionError(f"{name} reads a tensor of {tensor.device}, shape {tuple(tensor.shape)}")
        self.operators[name] += 1
        return function(*args, **(kwargs or {}))


class _NothingMadeOfNumbers(TorchFunctionMode):
    """Refuses tensors that are made of the host's numbers: each is a copy that the host waits for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and found.device.type == self.device.type:
            raise AssertionError(f"a tensor of shape {tuple(found.shape)} is copied from the host")
        return found


def moved(tree: Any, device: torch.device | str) -> Any:
    """A batch with all tensors, at any depth, on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {name: moved(part, device) for name, part in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(moved(part, device) for part in tree))
    return tree


class HostReads(TorchFunctionMode):
    """Counts what the host asks a device for, and waits for, by the functions that ask; on any device.

    Attributes:
        reads: How often each function asked.
    """

    ASKING = frozenset(
        {
            Tensor.__bool__,
            Tensor.__float__,
            Tensor.__int__,
            Tensor.__index__,
            Tensor.cpu,
            Tensor.item,
            Tensor.masked_select,
            Tensor.nonzero,
            Tensor.tolist,
            Tensor.unique,
            torch.equal,
            torch.masked_select,
            torch.nonzero,
            torch.unique,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self.ASKING:
            self.reads[function.__name__] += 1
        if function in (Tensor.__getitem__, Tensor.__setitem__) and _is_by_flags(args[1]):
            self.reads["by flags"] += 1
        return function(*args, **(kwargs or {}))


def _is_by_flags(index: Any) -> bool:
    """Whether an index's shape depends on values: flags, unless they are single."""
    return any(part.dtype == torch.bool and part.dim() > 0 for part in tensors_of(index))


class AttentionShapes(TorchFunctionMode):
    """Notes the shapes that cuDNN's attention, which makes a plan for each, would be asked for.

    Attributes:
        planned: Those of queries, keys and mask while cuDNN's attention is on.
        num_calls: All calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.planned: set[Any] = set()
        self.num_calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.num_calls += 1
            if torch.backends.cuda.cudnn_sdp_enabled():
                mask = kwargs.get("attn_mask")
                self.planned.add((*(part.shape for part in args[:2]), None if mask is None else mask.shape))
        return function(*args, **kwargs)
