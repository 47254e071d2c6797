"""Stops a run whose loss or weights are no longer finite, before they reach a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from decausal.errors import UserError
from decausal.training.run_directory import checkpoints
from decausal.training.sharding import are_finite

_NEVER = torch.iinfo(torch.int64).max


class BadSteps:
    """The first step whose loss was not finite, kept on the device and read only when the host waits anyway.

    Args:
        output_dir: The run's directory, whose last checkpoint errors name.
        gather: Returns a value of all processes, one after another.
    """

    def __init__(self, output_dir: Path, gather: Callable[[Tensor], Tensor]) -> None:
        self._output_dir = output_dir
        self._gather = gather
        self._first: Tensor | None = None

    def watch(self, loss: Tensor, step: int) -> None:
        """Takes the loss of a step.

        Raises:
            UserError: It is not finite, and reading it is free here.
        """
        if self._first is None:
            self._first = torch.full((), _NEVER, device=loss.device)
        self._first = torch.minimum(self._first, torch.where(loss.detach().isfinite(), _NEVER, step + 1))
        if _reads_at_once(loss.device):
            self._refuse_from(int(self._first))

    def refuse(self) -> None:
        """Raises UserError in all processes if any of them has seen a bad loss."""
        if self._first is not None:
            self._refuse_from(int(self._gather(self._first.reshape(1)).min()))

    def refuse_weights(self, model: torch.nn.Module, step: int) -> None:
        """Raises UserError if weights are not finite: a finite loss can have a gradient that is not."""
        if not bool(self._gather(are_finite(model).reshape(1)).all()):
            raise self._error(f"after step {step} some weights are not finite")

    def _refuse_from(self, first: int) -> None:
        if first != _NEVER:
            raise self._error(f"the loss at step {first} is not finite")

    def _error(self, what: str) -> UserError:
        kept = checkpoints(self._output_dir)
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
        remedy = "try a lower --learning_rate, a longer --warmup_steps or --bf16 false"
        return UserError(f"{what}, so training stopped; {where}; {remedy}")


def _reads_at_once(device: torch.device) -> bool:
    """Returns whether reading a value is free. On an accelerator the host would wait for all queued work."""
    return device.type == "cpu"
