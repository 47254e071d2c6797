"""Settings for windows of positions that are decided at a time, and for caching around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from decausal.sampling.settings.field import COUNT, WHOLE_ROWS, Flag, one_of, setting

if TYPE_CHECKING:
    from decausal.sampling.settings import SamplerSettings

CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """Which positions are decided at a time.

    Attributes:
        window: Open positions that are decided at a time, from left to right. The next window begins when all of them
            are kept. Each window has its share of `num_steps`, at least one step. None: all at once. Source:
            semi-autoregressive decoding, LLaDA (arXiv 2502.09992).
        cache: Keys and values that a pass inside a window reuses from the last pass over the whole row: "prefix" those
            before the window, "dual" also those after it. This is an approximation, because they were computed when
            fewer tokens were known. Needs `window`. Source: Fast-dLLM (arXiv 2505.22618).
        cache_refresh: After this many passes the whole row is read again, as in the first pass of each window; 1 is
            exact. None: only in the first pass.
    """

    window: int | None = setting(
        None, COUNT, Flag("open positions that are decided at a time, left to right", {"type": int}), only=WHOLE_ROWS
    )
    cache: str = setting(
        "none",
        one_of(CACHES),
        Flag("what a pass inside a window does not read again (none)", {"choices": CACHES}),
        only=WHOLE_ROWS,
        details=(("cache_refresh",), ("prefix", "dual")),
    )
    cache_refresh: int | None = setting(
        None, COUNT, Flag("passes after which the whole row is read again", {"type": int})
    )

    def contradiction(self: SamplerSettings) -> str | None:
        """Returns what these settings contradict, in words."""
        if self.cache != "none" and self.window is None:
            return f"cache={self.cache!r} needs window: it holds keys and values of what is outside of it; give window"
        if self.cache_refresh is not None and self.cache == "none":
            return f"cache_refresh={self.cache_refresh} needs cache='prefix' or cache='dual'; give one"
        return None
