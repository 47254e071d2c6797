"""A recorder for the CPU that does what a CUDA graph does: the same operators again, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What no graph can hold: numbers of the device on the host, shapes that depend on them, numbers of the host.
FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
}


class Tape(TorchDispatchMode):
    """Writes down operators as they run, and runs them again into the very tensors that they gave."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Callable[..., Any], tuple, dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert function not in FORBIDDEN, f"{function} cannot be in a CUDA graph"
        found = function(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self._steps.append((function, args, kwargs or {}, results))
        return found

    def replay(self) -> None:
        for function, args, kwargs, results in self._steps:
            again = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for held, new in zip(results, again, strict=True):
                if held.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    held.copy_(new)


class Tapes:
    """Records tapes.

    Attributes:
        num_recorded: how many.
        num_replayed: how often they were run again.
        patience: see `PassRecorder`.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.num_recorded = self.num_replayed = 0

    def __call__(
        self, function: Callable[[], None], unchanged: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], None]:
        with unchanged():
            function()
        with unchanged(), Tape() as tape:
            function()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            tape.replay()

        return replay
