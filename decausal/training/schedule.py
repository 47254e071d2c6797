"""How a loss weight changes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

WeightShape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class WeightSchedule:
    """A loss weight as a function of the optimiser step.

    Attributes:
        weight: Value at `start_step`; before it the weight is 0.
        shape: "constant", or a "linear" or "cosine" fall to 0 at the end.
        stop_step: First step from which the weight stays 0. What only this loss needs can then be dropped.
        num_steps: The run's number of steps, at which a falling weight reaches 0 without a `stop_step`.
        start_step: First step in which the loss counts.
    """

    weight: float
    shape: WeightShape = "constant"
    stop_step: int | None = None
    num_steps: int = 0
    start_step: int = 0

    def __call__(self, step: int) -> float:
        if self.is_over(step) or step < self.start_step:
            return 0.0
        if self.shape == "constant":
            return self.weight
        progress = (step - self.start_step) / max(1, self.end - self.start_step)
        return self.weight * ((1 - progress) if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))

    @property
    def end(self) -> int:
        return self.num_steps if self.stop_step is None else self.stop_step

    def is_over(self, step: int) -> bool:
        """Returns whether the weight is 0 at `step` and all later steps."""
        return self.weight == 0 or (self.stop_step is not None and step >= self.stop_step)


def steps(count: int | float | None, num_steps: int) -> int | None:
    """Returns a number of steps, given as a whole number or as a share of the run (below 1)."""
    if count is None:
        return None
    return round(count * num_steps) if count < 1 else int(count)
