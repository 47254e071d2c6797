"""The measurements of a run, and when one run reached the other's best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from decausal.reporting import share_of_the_way

Measure = Literal["masked_cross_entropy", "nelbo_per_token"]

MEASURES: dict[Measure, str] = {"masked_cross_entropy": "masked cross-entropy", "nelbo_per_token": "NELBO"}
"""The measures that fall as a run trains, with their names."""


@dataclass(frozen=True)
class Measurement:
    """Held-out figures after `step` training steps.

    Attributes:
        step: Training steps taken.
        seconds: Time spent in training so far; measuring is not counted.
        masked_cross_entropy: Nats per masked token, at uniform noise level.
        nelbo_per_token: Nats per token.
        bits_per_byte: The NELBO in other units (None if the text has no bytes).
    """

    step: int
    seconds: float
    masked_cross_entropy: float
    nelbo_per_token: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Crossing:
    """Where the aligned run reached the plain run's best value of a measure.

    Attributes:
        measure: The measure.
        start: Its value before any training, the same in both runs.
        plain_best: The plain run's lowest value after that, first reached at `plain_step` and `plain_seconds`.
        aligned_best: The aligned run's lowest measured value, first reached at `aligned_best_step`.
        aligned_step: Step of the aligned run's first measurement at or below `plain_best`, or None.
        aligned_seconds: Training time at that measurement.
        between_step: Where the straight line from the measurement before it meets `plain_best`.
        between_seconds: The same in training time.
    """

    measure: Measure
    start: float
    plain_best: float
    plain_step: int
    plain_seconds: float
    aligned_best: float
    aligned_best_step: int
    aligned_step: int | None = None
    aligned_seconds: float | None = None
    between_step: float | None = None
    between_seconds: float | None = None

    def sentence(self) -> str:
        """Returns the finding in words."""
        start = (
            f"Plain denoising's best {MEASURES[self.measure]} was {self.plain_best:.3f} nats, "
            f"at step {self.plain_step} ({self.plain_seconds:.1f} s of training)"
        )
        start += "." if self.plain_best < self.start else f", no better than the {self.start:.3f} that both began with."
        if self.aligned_step is None or self.aligned_seconds is None:
            own = f"{self.aligned_best:.3f} nats, at step {self.aligned_best_step}"
            return f"{start} REPR-ALIGN did not reach it: its own best was {own}."
        return (
            f"{start} REPR-ALIGN was there by step {self.aligned_step} ({self.aligned_seconds:.1f} s): "
            f"{self.aligned_step / self.plain_step:.2f} times the steps, "
            f"{self.aligned_seconds / self.plain_seconds:.2f} times the time."
        )


def best(measurements: Sequence[Measurement], measure: Measure) -> Measurement:
    """Returns the first measurement with the lowest value after the start of training."""
    trained = [measurement for measurement in measurements if measurement.step > 0]
    return min(trained, key=lambda measurement: getattr(measurement, measure))


def crossing(plain: Sequence[Measurement], aligned: Sequence[Measurement], measure: Measure) -> Crossing:
    """Returns where the aligned run reached the plain run's best value, or that it never did.

    Both are taken from the measurements, the first of which is the start. So both are as coarse as the intervals.
    """
    plain_best, aligned_best = best(plain, measure), best(aligned, measure)
    target: float = getattr(plain_best, measure)
    found = Crossing(
        measure,
        start=getattr(plain[0], measure),
        plain_best=target,
        plain_step=plain_best.step,
        plain_seconds=plain_best.seconds,
        aligned_best=getattr(aligned_best, measure),
        aligned_best_step=aligned_best.step,
    )
    for before, now in pairwise(aligned):
        if getattr(now, measure) <= target:
            share = share_of_the_way(getattr(before, measure), getattr(now, measure), target)
            return Crossing(
                **vars(found)
                | {
                    "aligned_step": now.step,
                    "aligned_seconds": now.seconds,
                    "between_step": before.step + share * (now.step - before.step),
                    "between_seconds": before.seconds + share * (now.seconds - before.seconds),
                }
            )
    return found
