"""What a block engine is asked for and gives back, and what the host knows of a row in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decausal.sampling.jobs import Ended
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import tokens_to_stop


@dataclass(frozen=True)
class Request:
    """A row to write.

    Attributes:
        prompt_ids: given tokens. With shift 1 at least one.
        settings: how it is written. `num_steps` counts steps per block; more than the block size is no error.
        seed: of its random numbers. None: `settings.seed`.
        name: what error messages call the prompt.
    """

    prompt_ids: Sequence[int]
    settings: SamplerSettings = field(default_factory=SamplerSettings)
    seed: int | None = None
    name: str = "the prompt"


@dataclass(frozen=True)
class Finished:
    """A row that is written.

    Attributes:
        ticket: what `submit` returned for it.
        ids: the new tokens: up to the end token or the token that completes a stop text, at most `max_new_tokens`.
        block_of_token: for each of `ids`, its block on the grid that starts with the row.
        step_of_token: for each of `ids`, the denoising step within its block, from 0.
        row_step_of_token: the same, counted over the whole row.
        num_forwards: passes that the row took part in, the one that read the prompt included.
        finish_reason: "end" (an end token), "stop" (a stop text) or "length".
        first_block: block in which the first new token stands.
        whole_ids: all tokens of its whole blocks, from position `first_block` * block size: also those of the prompt's
            tail, those kept behind the end, and the mask token where nothing was kept.
        whole_steps: for each of `whole_ids`, the step within its block; -1 where given or not kept.
    """

    ticket: int
    ids: list[int]
    block_of_token: list[int]
    step_of_token: list[int]
    row_step_of_token: list[int]
    num_forwards: int
    finish_reason: str
    first_block: int
    whole_ids: list[int]
    whole_steps: list[int]

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the text, the end token included, over all passes."""
        return len(self.ids) / self.num_forwards

    @property
    def ended(self) -> Ended:
        """What every engine tells of a row that ended; steps are counted over the whole row."""
        return Ended(self.ids, self.row_step_of_token, self.num_forwards, self.finish_reason)


@dataclass(frozen=True)
class StepEvent:
    """What one pass did to one row.

    Attributes:
        ticket: the row's.
        block: the block that was denoised.
        step: the step within it.
        positions, ids: what was kept, by position in the row.
        finished: the row as it ended, in its last event.
    """

    ticket: int
    block: int
    step: int
    positions: list[int]
    ids: list[int]
    finished: Finished | None = None


@dataclass
class ActiveRow:
    """What the host knows of a row in use.

    Attributes:
        ticket, request: whose row it is.
        block_size: tokens per block.
        is_new: not yet written to the device.
        start: first position of the block that is being denoised.
        committed: positions before this one are in the cache.
        num_candidates: masked positions of the block that may be kept in the next step.
        num_forwards: passes so far.
        step, row_step: denoising steps so far, of the block and of the row.
        ids, steps: of the finished blocks, from `first_block` on.
        first_steps: of these blocks, the `row_step` of their first step.
    """

    ticket: int
    request: Request
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
        self.num_candidates = self._num_first_candidates(self.block_size - self.prompt_length % self.block_size)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def first_block(self) -> int:
        return self.prompt_length // self.block_size

    @property
    def limit(self) -> int:
        """First position that is not wanted any more."""
        return self.prompt_length + self.request.settings.max_new_tokens

    @property
    def length(self) -> int:
        """Positions of the row in whole blocks."""
        return -(-self.limit // self.block_size) * self.block_size

    @property
    def window(self) -> range:
        """What the next pass reads."""
        return range(self.committed, self.start + self.block_size)

    def note_step(self, num_candidates: int) -> None:
        """A pass has denoised the block once more."""
        self.num_forwards += 1
        self.step += 1
        self.row_step += 1
        self.num_candidates = num_candidates

    def end_block(self, ids: list[int], steps: list[int], ends: Sequence[int], tokenizer: Any) -> Finished | None:
        """Takes a block that is done; returns the row if that was its last one, else goes on to the next."""
        already_new = max(0, len(self.ids) - self.prompt_length % self.block_size)
        self.ids += ids
        self.steps += steps
        self.first_steps.append(self.row_step - self.step)
        num_new, reason = self._end(already_new, ends, tokenizer)
        if reason is not None:
            return self._finished(num_new, reason)
        self.start += self.block_size
        self.step = 0
        self.num_candidates = self._num_first_candidates(self.block_size)
        return None

    def _num_first_candidates(self, num_open: int) -> int:
        """As `BlockRows.is_candidate` has them in a block's first step."""
        is_first_alone = self.request.settings.first_token_from_clean and num_open == self.block_size
        return 1 if is_first_alone else num_open

    def _end(self, already_new: int, ends: Sequence[int], tokenizer: Any) -> tuple[int, str | None]:
        """How many new tokens the row has, and why it is finished; None: it is not."""
        new = self.ids[self.prompt_length % self.block_size :][: self.request.settings.max_new_tokens]
        num_new, reason = len(new), "length" if self.start + self.block_size >= self.limit else None
        for index in range(already_new, len(new)):
            if new[index] in ends:
                num_new, reason = index + 1, "end"
                break
        settings = self.request.settings
        num_to_stop = tokens_to_stop(tokenizer, self.request.prompt_ids, new[:num_new], already_new, settings)
        return (num_new, reason) if num_to_stop is None else (num_to_stop, "stop")

    def _finished(self, num_new: int, reason: str) -> Finished:
        size, tail = self.block_size, self.prompt_length % self.block_size
        places = range(tail, tail + num_new)
        return Finished(
            ticket=self.ticket,
            ids=self.ids[tail : tail + num_new],
            block_of_token=[self.first_block + place // size for place in places],
            step_of_token=self.steps[tail : tail + num_new],
            row_step_of_token=[self.first_steps[place // size] + self.steps[place] for place in places],
            num_forwards=self.num_forwards,
            finish_reason=reason,
            first_block=self.first_block,
            whole_ids=self.ids,
            whole_steps=self.steps,
        )
