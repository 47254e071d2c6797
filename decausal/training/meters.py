"""What a run has used: tokens that the student read or wrote, and seconds spent training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from decausal.data.counts import Count


class TokenCounts(NamedTuple):
    """Tokens that a run has trained on so far. A token that is trained on twice counts twice.

    Attributes:
        clean: Tokens of the clean rows that training forwards read, with prompts and without padding.
        supervised: Targets of the loss: positions whose prediction is compared with something.
        generated: Tokens that rollouts have written, whether or not they were trained on.
    """

    clean: int = 0
    supervised: int = 0
    generated: int = 0

    @property
    def total(self) -> int:
        """Clean tokens and generated ones."""
        return self.clean + self.generated


class TokenMeter:
    """Adds up what a run is trained on, over all processes, on the device. Reading it waits for the device."""

    def __init__(self) -> None:
        self._before = TokenCounts()
        self._sums: dict[str, Tensor] = {}

    def add(self, counts: Mapping[str, Tensor]) -> None:
        """Adds the counts of one global batch."""
        for name in (Count.CLEAN, Count.SUPERVISED, Count.GENERATED):
            if name in counts:
                number = counts[name].to(torch.int64)
                self._sums[name] = self._sums[name] + number if name in self._sums else number

    @property
    def counts(self) -> TokenCounts:
        sums = {name: int(total) for name, total in self._sums.items()}
        return TokenCounts(*(before + sums.get(name, 0) for name, before in self._before._asdict().items()))

    def start_from(self, counts: TokenCounts) -> None:
        """Continues from the counts of an earlier part of the run."""
        self._before, self._sums = counts, {}


@dataclass
class Clock:
    """A clock that stops while a run is not training.

    Attributes:
        now: Returns the time in seconds from any start.
        passed: Seconds before the last start; a resumed run begins with those of its earlier part.
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
