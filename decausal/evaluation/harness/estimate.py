"""A log-likelihood that keeps its standard error through the harness and its cache."""

from __future__ import annotations

import math
from typing import Any


class Estimate(float):
    """A log-likelihood in nats with a `standard_error` over the draw of masks; 0 if nothing was drawn.

    The harness takes it for a plain number.
    """

    standard_error: float

    def __new__(cls, value: float, standard_error: float = 0.0) -> Estimate:
        estimate = super().__new__(cls, value)
        estimate.standard_error = standard_error
        return estimate

    def __add__(self, other: float | int) -> Estimate:
        """Returns the sum of independent estimates."""
        error = math.hypot(self.standard_error, getattr(other, "standard_error", 0.0))
        return Estimate(float(self) + float(other), error)

    __radd__ = __add__

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.standard_error)
