"""Means of logged values, added up on the device between two log lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor


class LogMeans:
    """Values by name. A name counts only in steps in which it was added, so a loss that begins late has its own
    mean."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_added: Counter[str] = Counter()

    def add(self, name: str, value: Tensor) -> None:
        """Adds the share of this process and micro-batch in a mean over the global batch."""
        total = self._sums.get(name)
        self._sums[name] = value.detach().clone() if total is None else total + value.detach()
        self._num_added[name] += 1

    def take(self, sum_over_processes: Callable[[Tensor], Tensor], micro_batches: int) -> dict[str, float]:
        """Returns the means per step since the last call. The host waits for the device.

        Args:
            sum_over_processes: Adds up a value of all processes.
            micro_batches: Micro-batches of a step.
        """
        means = {
            name: round(float(sum_over_processes(value)) / (self._num_added[name] / micro_batches), 6)
            for name, value in self._sums.items()
        }
        self._sums.clear()
        self._num_added.clear()
        return means
