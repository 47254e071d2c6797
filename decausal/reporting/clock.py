"""A clock that stands still where a run is not training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds that have passed while it ran.

    Attributes:
        now: the time, in seconds from any start.
        passed: seconds before the last start; what a resumed run begins with.
    """

    now: Callable[[], float] = time.perf_counter
    passed: float = 0.0
    _started: float | None = field(default=None, repr=False)

    def start(self) -> None:
        self._started = self.now()

    def stop(self) -> None:
        self.passed, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        return self.passed + (0.0 if self._started is None else self.now() - self._started)
