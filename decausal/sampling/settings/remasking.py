"""Settings for opening kept tokens again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decausal.sampling.settings.field import SHARE, WHOLE_ROWS, Flag, Rule, setting

if TYPE_CHECKING:
    from decausal.sampling.settings import SamplerSettings

REMASKINGS = ("p2", "remdm", "remdm_loop")
DEFAULT_REMASK_RATE = 0.02


def _as_remasking(remask: Any) -> Any:
    """Converts True, the older name of P2, and "none", a word for False."""
    return {True: "p2", "none": False}.get(remask, remask) if isinstance(remask, bool | str) else remask


@dataclass(frozen=True, kw_only=True)
class RemaskingSettings:
    """How kept tokens are opened again.

    Attributes:
        remask: Whether kept tokens may be opened again, in the current window only. False: never. "p2" (or True): every
            step scores kept tokens again, each by its current probability, and keeps the best of all. The number kept
            grows every step. Not with `entropy_bound`. Source: P2 (arXiv 2502.03540), the model its own planner.
            "remdm": every step opens each kept token with probability `remask_rate`, or less if too few steps are left
            to keep it again. "remdm_loop": tokens are kept up to 0.9 of the positions in the first 0.45 of the steps.
            Then tokens are opened and others kept until 0.95 of the steps. Then the rest is kept. Both need
            `num_steps`. More steps than positions give more chances to correct. Source: ReMDM (arXiv 2503.00307), its
            schedules "cap" and "loop", with even counts instead of random ones.
        remask_rate: The rate of "remdm" and "remdm_loop", 0.02 by default.
    """

    remask: bool | str = setting(
        False,
        Rule(
            lambda value: value is False or (isinstance(value, str) and value in REMASKINGS),
            f"True, False, or one of {', '.join(REMASKINGS)}",
        ),
        Flag("let kept tokens be reconsidered: --remasking p2", {"action": "store_const", "const": "p2"}),
        Flag("how tokens are opened again", {"dest": "remask", "choices": ("none", *REMASKINGS)}, ("--remasking",)),
        settle=_as_remasking,
        only=WHOLE_ROWS,
        details=(("remask_rate",), ("remdm", "remdm_loop")),
        aliases=("remasking",),
    )
    remask_rate: float | None = setting(
        None, SHARE, Flag("remdm and remdm_loop: chance that a kept token is opened (0.02)", {"type": float})
    )

    @property
    def is_remdm(self) -> bool:
        """Whether kept tokens are opened at random."""
        return self.remask in ("remdm", "remdm_loop")

    def contradiction(self: SamplerSettings) -> str | None:
        """Returns what these settings contradict, in words."""
        if self.is_remdm and self.schedule != "num_steps":
            schedule = f"{self.schedule}={getattr(self, self.schedule)}"
            return (
                f"remask={self.remask!r} goes with num_steps, not with {schedule}: its rates follow the steps that are "
                "left; give num_steps, or remask='p2'"
            )
        if self.remask == "p2" and self.entropy_bound is not None:
            return (
                "remask and entropy_bound exclude each other: the bound is about open positions; "
                "give num_steps or threshold with remask"
            )
        if self.remask == "p2" and self.order != "confidence":
            return (
                f"remask='p2' keeps the surest of all tokens, so it cannot follow order={self.order!r}; leave order "
                "out, or give remask='remdm'"
            )
        if self.remask_rate is not None and not self.is_remdm:
            return f"remask_rate={self.remask_rate} is for remask='remdm' and 'remdm_loop'; give one of them"
        return None
