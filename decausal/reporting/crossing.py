"""Where a curve of measurements meets a value."""

from __future__ import annotations


def share_of_the_way(before: float, now: float, target: float) -> float:
    """Returns where the straight line from one measurement to the next meets `target`: 0 at the first, 1 at the second.

    Curves may fall or rise. 1 where `target` does not lie between the two: it was had at the second and not before.
    """
    is_between = before > target >= now or before < target <= now
    return (target - before) / (now - before) if is_between else 1.0
