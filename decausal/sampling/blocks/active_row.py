"""The host's view of a row that a block engine writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from decausal.sampling.jobs import Blocks, Ended, Job
from decausal.sampling.stopping import tokens_to_stop


@dataclass
class ActiveRow:
    """The host's view of a running row.

    Attributes:
        ticket, job: The row's ticket and job.
        block_size: Tokens per block.
        is_new: Whether it has not been written to the device yet.
        start: First position of the block that is being denoised.
        committed: Positions before this one are in the cache.
        num_eligible: Masked positions of the block that may be kept in the next step.
        num_forwards: Passes so far.
        step, row_step: Denoising steps so far, of the block and of the row.
        ids, steps: Tokens and steps of the finished blocks, from `first_block` on.
        first_steps: The `row_step` of the first step of each of these blocks.
    """

    ticket: int
    job: Job
    block_size: int
    is_new: bool = True
    committed: int = 0
    num_forwards: int = 0
    step: int = 0
    row_step: int = 0
    ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    first_steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.first_block * self.block_size
        self.num_eligible = self._num_first_eligible(self.block_size - self.prompt_length % self.block_size)

    @property
    def prompt(self) -> list[int]:
        return self.job.row.given[0]

    @property
    def prompt_length(self) -> int:
        return len(self.prompt)

    @property
    def num_wanted(self) -> int:
        """The most new tokens."""
        return self.job.row.gaps[0]

    @property
    def first_block(self) -> int:
        return self.prompt_length // self.block_size

    @property
    def limit(self) -> int:
        """First position that is not wanted any more."""
        return self.prompt_length + self.num_wanted

    @property
    def length(self) -> int:
        """Positions of the row in whole blocks."""
        return -(-self.limit // self.block_size) * self.block_size

    @property
    def unread(self) -> range:
        """What the next pass reads: tokens without keys and values in the cache yet, and the open block."""
        return range(self.committed, self.start + self.block_size)

    def note_step(self, num_eligible: int) -> None:
        """Notes that a pass has denoised the block once more."""
        self.num_forwards += 1
        self.step += 1
        self.row_step += 1
        self.num_eligible = num_eligible

    def end_block(self, ids: list[int], steps: list[int], tokenizer: Any) -> Ended | None:
        """Takes in a finished block. Returns how the row ended if it was the last one, else moves to the next block."""
        already_new = max(0, len(self.ids) - self.prompt_length % self.block_size)
        self.ids += ids
        self.steps += steps
        self.first_steps.append(self.row_step - self.step)
        num_new, reason = self._end(already_new, tokenizer)
        if reason is not None:
            return self._ended(num_new, reason)
        self.start += self.block_size
        self.step = 0
        self.num_eligible = self._num_first_eligible(self.block_size)
        return None

    def _num_first_eligible(self, num_open: int) -> int:
        """Returns how many positions `BlockRows.is_eligible` marks in a block's first step."""
        is_first_alone = self.job.settings.first_token_from_clean and num_open == self.block_size
        return 1 if is_first_alone else num_open

    def _end(self, already_new: int, tokenizer: Any) -> tuple[int, str | None]:
        """Returns how many new tokens the row has and why it is finished, or None if it is not."""
        new = self.ids[self.prompt_length % self.block_size :][: self.num_wanted]
        num_new, reason = len(new), "length" if self.start + self.block_size >= self.limit else None
        for index in range(already_new, len(new)):
            if new[index] in self.job.end_token_ids:
                num_new, reason = index + 1, "end"
                break
        num_to_stop = tokens_to_stop(tokenizer, self.prompt, new[:num_new], already_new, self.job.settings)
        return (num_new, reason) if num_to_stop is None else (num_to_stop, "stop")

    def _ended(self, num_new: int, reason: str) -> Ended:
        size, tail = self.block_size, self.prompt_length % self.block_size
        places = range(tail, tail + num_new)
        blocks = Blocks(
            of_token=[self.first_block + place // size for place in places],
            step_of_token=self.steps[tail : tail + num_new],
            first=self.first_block,
            ids=self.ids,
            steps=self.steps,
        )
        return Ended(
            ids=self.ids[tail : tail + num_new],
            step_of_token=[self.first_steps[place // size] + self.steps[place] for place in places],
            num_forwards=self.num_forwards,
            reason=reason,
            blocks=blocks,
        )
