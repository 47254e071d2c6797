"""Settings for the positions that a step keeps, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from decausal.sampling.settings.field import AMOUNT, COUNT, SHARE, WHOLE_ROWS, Flag, one_of, setting

if TYPE_CHECKING:
    from decausal.sampling.settings import SamplerSettings

SCHEDULES = ("num_steps", "threshold", "entropy_bound")
"""A row follows one of these."""
DEFAULT_THRESHOLD = 0.9
CONFIDENCES = ("probability", "margin", "entropy")
ORDERS = ("confidence", "random", "left_to_right")
OF_STEPS = (*SCHEDULES, "confidence")
"""What steps of denoising keep. Verified decoding has no such steps."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Which positions a step keeps.

    Attributes:
        num_steps: Static schedule: a row's open positions are kept in this many steps, spread evenly (one per step if
            there are fewer positions than steps). For block models: the open positions of each block.
        threshold: Dynamic schedule: a step keeps every position at least this confident, and at least one per row.
            Without any schedule it is 0.9.
        entropy_bound: Dynamic schedule, in nats: a step keeps positions by entropy, the lowest first, while the
            entropies of all except the last sum to at most this. It bounds the loss from drawing them independently. 0
            keeps one per row. Source: EB-sampler (arXiv 2505.24857), entropy as the proxy for error. The three
            schedules exclude each other.
        confidence: "probability", "margin" or "entropy": see `decausal.sampling.confidence`.
        order: Which positions are kept first: "confidence" (the surest), "random" (drawn again in each step) or
            "left_to_right". The last two need `num_steps`, since the other schedules depend on confidence.
    """

    num_steps: int | None = setting(
        None,
        COUNT,
        Flag("denoising steps, spread evenly", {"type": int}, ("--steps", "--denoising_steps")),
        aliases=("denoising_steps", "num_denoising_steps", "steps"),
    )
    threshold: float | None = setting(
        None,
        SHARE,
        Flag("keep every token at least this sure (0.9)", {"type": float}, ("--confidence_threshold",)),
        aliases=("confidence_threshold",),
    )
    entropy_bound: float | None = setting(
        None, AMOUNT, Flag("keep what is nearly independent, in nats", {"type": float})
    )
    confidence: str = setting("probability", one_of(CONFIDENCES), Flag("what 'sure' means", {"choices": CONFIDENCES}))
    order: str = setting(
        "confidence", one_of(ORDERS), Flag("what is kept first (confidence)", {"choices": ORDERS}), only=WHOLE_ROWS
    )

    @property
    def schedule(self) -> str:
        """The schedule in `SCHEDULES` that is followed."""
        return next(name for name in SCHEDULES if getattr(self, name) is not None)

    def complete(self) -> None:
        """Fills in the default schedule if none is given."""
        if all(getattr(self, name) is None for name in SCHEDULES):
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)

    def contradiction(self: SamplerSettings) -> str | None:
        """Returns what these settings contradict, in words."""
        given = [name for name in SCHEDULES if getattr(self, name) is not None]
        if len(given) > 1:
            values = " and ".join(f"{name}={getattr(self, name)}" for name in given)
            return (
                f"{values} exclude each other: give num_steps for a fixed number of steps, threshold to keep whatever "
                "is sure enough, or entropy_bound to keep what is nearly independent"
            )
        if self.order != "confidence" and self.schedule != "num_steps":
            schedule = f"{self.schedule}={getattr(self, self.schedule)}"
            return (
                f"order={self.order!r} goes with num_steps, not with {schedule}: that schedule keeps what is surest; "
                "give num_steps"
            )
        return None
