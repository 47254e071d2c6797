"""How much a pass of verified decoding reads."""

from __future__ import annotations

from typing import NamedTuple


class Extent(NamedTuple):
    """The most that a pass reads of any of its rows. The host knows it, so that no tensor's shape depends on a number
    on the device.

    Attributes:
        num_given: Known tokens that are not in the cache yet: 1 if only the last one is missing.
        num_drafts: Pending drafts.
        num_masks: Masks, of all groups.
        num_new: Tokens that are drafted.
        num_keys: Slots in use.
    """

    num_given: int
    num_drafts: int
    num_masks: int
    num_new: int
    num_keys: int
