"""The host's view of a row that self-speculation writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decausal.sampling.blocks.draft_choice import DraftChoice
from decausal.sampling.blocks.draft_shapes import DraftShape
from decausal.sampling.blocks.draft_tables import Drafting
from decausal.sampling.blocks.extent import Extent
from decausal.sampling.jobs import Drafts, Ended, Job, Progress, TokenLogProbs
from decausal.sampling.stopping import tokens_to_stop


@dataclass(eq=False)
class DraftingRow:
    """A row that has a place or waits for one.

    What a pass changes on the device follows from its number of tokens. So the host keeps count and need not ask.

    Attributes:
        ticket: The engine's ticket.
        job: The job of the row.
        shape: The shape of its drafts.
        by_masks: Whether masks decide which drafts are right, see `Drafting`.
        choice: What chooses its shape; None if its settings name one.
        place: Its place among the rows in use.
        num_cached: Known tokens whose keys and values are in the cache.
        num_prefix_tokens: Given tokens that the prefix cache held when the row began.
        pending: Number of pending drafts.
        num_given: Known tokens that the present pass reads.
        is_drafting: Whether the present pass drafts.
        ids: New tokens. `pass_of_token` says which of the row's passes brought each.
        num_forwards: Passes so far.
        num_verified, num_right: See `Drafts`.
        passes: Passes by the name of the shape, after the one that finished reading the prompt.
        num_tokens: Tokens of these passes.
    """

    ticket: int
    job: Job
    shape: DraftShape
    by_masks: bool = False
    choice: DraftChoice | None = None
    place: int = -1
    num_cached: int = 0
    num_prefix_tokens: int = 0
    pending: int = 0
    num_given: int = 0
    is_drafting: bool = False
    ids: list[int] = field(default_factory=list)
    pass_of_token: list[int] = field(default_factory=list)
    num_forwards: int = 0
    num_verified: list[int] = field(default_factory=list)
    num_right: list[int] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0

    @property
    def prompt(self) -> list[int]:
        """The given tokens."""
        return self.job.row.given[0]

    @property
    def drafting(self) -> Drafting:
        """Returns what the row drafts now."""
        return Drafting(self.shape, self.by_masks)

    @property
    def num_unread(self) -> int:
        """Known tokens that the model has not read, at least the last one."""
        return len(self.prompt) + len(self.ids) - self.num_cached

    def change_shape(self, shape: DraftShape) -> None:
        """Changes the shape. Pending drafts that it cannot verify are dropped."""
        self.shape, self.pending = shape, min(self.pending, shape.most_pending)

    def note(self, tokens: Sequence[int]) -> None:
        """Takes in the result of a pass. If it has no tokens, more of the prompt has to be read."""
        self.num_cached += self.num_given
        if tokens:
            num_right = len(tokens) - 1
            if self.ids:
                self._count(num_right)
            self.num_cached += num_right
            self.pending = self.shape.groups[self.pending][num_right] if self.is_drafting else 0

    def _count(self, num_right: int) -> None:
        """Counts a pass after the one that finished reading the prompt."""
        num_verified = min(num_right + 1, self.pending)
        missing = [0] * (num_verified - len(self.num_verified))
        self.num_verified += missing
        self.num_right += missing
        for place in range(num_verified):
            self.num_verified[place] += 1
            self.num_right[place] += place < num_right
        self.passes[self.shape.name] += 1
        self.num_tokens += num_right + 1

    def take(self, tokens: list[int], log_probs: list[TokenLogProbs], tokenizer: Any) -> Progress:
        """Adds the tokens of a pass, up to an end token, a stop text or the limit."""
        first, step = len(self.ids), self.num_forwards
        self.num_forwards += 1
        reason = self._extend(tokens, tokenizer)
        kept = self.ids[first:]
        self.pass_of_token += [step] * len(kept)
        start = len(self.prompt) + first
        return Progress(
            ticket=self.ticket,
            step=step,
            positions=list(range(start, start + len(kept))),
            ids=kept,
            confidence=[math.exp(log_prob) for log_prob, _ in log_probs[: len(kept)]],
            log_probs=[] if self.job.num_top_log_probs is None else log_probs[: len(kept)],
            ended=None if reason is None else self._ended(reason),
            row=self.job.row if step == 0 else None,
        )

    def _ended(self, reason: str) -> Ended:
        drafts = Drafts(tuple(self.num_verified), tuple(self.num_right), self.passes, self.num_tokens)
        return Ended(
            self.ids,
            self.pass_of_token,
            self.num_forwards,
            reason,
            drafts=drafts,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def _extend(self, tokens: list[int], tokenizer: Any) -> str | None:
        """Returns why the row is over, or None if it is not."""
        (limit,), ends, settings = self.job.row.gaps, self.job.end_token_ids, self.job.settings
        first = len(self.ids)
        new = tokens[: limit - first]
        num_to_end = next((number for number, token in enumerate(new, start=1) if token in ends), None)
        self.ids += new[:num_to_end]
        reason = "end" if num_to_end else "length" if len(self.ids) == limit else None
        num_to_stop = tokens_to_stop(tokenizer, self.prompt, self.ids, first, settings)
        if num_to_stop is not None:
            del self.ids[num_to_stop:]
            reason = "stop"
        return reason


def extent_of(rows: Sequence[DraftingRow], most_given: int, shift: int) -> Extent:
    """Returns how much a pass reads of some rows. The device finds the same numbers by itself. Each row gets its part.

    Args:
        rows: Rows of the pass.
        most_given: The most known tokens that it reads of a row.
        shift: The model's shift.
    """
    verifies = any(row.shape.takes_turns and row.pending for row in rows)
    masks, new, keys = [], [], []
    for row in rows:
        row.num_given = min(row.num_unread, most_given)
        waits = verifies and row.shape.takes_turns and not row.pending
        row.is_drafting = row.num_given == row.num_unread and not waits
        masks.append(row.drafting.num_masks(row.pending, shift, row.is_drafting))
        new.append(max(row.shape.groups[row.pending]) if row.is_drafting else 0)
        keys.append(row.num_cached + row.num_given + row.pending + masks[-1])
    return Extent(
        num_given=max(row.num_given for row in rows),
        num_drafts=max(row.pending for row in rows),
        num_masks=max(masks),
        num_new=max(new),
        num_keys=max(keys),
    )
