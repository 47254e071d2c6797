"""What every engine takes and tells: one row wanted, what a step brought it, how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from decausal.errors import UserError
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings

BATCH_SIZE = 16
"""Rows written together unless told otherwise."""

TokenLogProbs = tuple[float, list[tuple[int, float]]]
"""A token's log-probability, and the likeliest ids in its place with theirs."""


@dataclass(frozen=True)
class Job:
    """One row to write.

    Attributes:
        row: Given tokens and gaps; a prompt is a row whose one gap stands at its end.
        settings: How its gaps are filled, and the strings that end it. `max_new_tokens` and `seed` are not used: the
            gaps say how much is written, and `seed` below what it draws from.
        seed: What the row draws from.
        end_token_ids: The row ends once one of these is kept and everything before it is kept too. Rows with text
            after a gap have none.
        is_watched: Every step says how sure the model was.
        num_top_log_probs: Alternatives to report for every kept token; None reports no log-probabilities at all.
    """

    row: Row
    settings: SamplerSettings
    seed: int
    end_token_ids: tuple[int, ...] = ()
    is_watched: bool = False
    num_top_log_probs: int | None = None

    @property
    def wants_log_probs(self) -> bool:
        """Whether a step has to score what it kept."""
        return self.is_watched or self.num_top_log_probs is not None


@dataclass(frozen=True)
class Blocks:
    """What a block model knows of a row beyond its tokens. Blocks are counted on the grid that starts with the row.

    Attributes:
        of_token: For each new token, its block.
        step_of_token: For each new token, the denoising step within its block, from 0.
        first: The block in which the first new token stands.
        ids: All tokens of the row's whole blocks from position `first` * block size on: the end of the prompt and what
            was kept after the end of the text are among them, and the mask token stands where nothing was kept.
        steps: For each of `ids`, the step within its block; -1 where given or not kept.
    """

    of_token: list[int]
    step_of_token: list[int]
    first: int
    ids: list[int]
    steps: list[int]


@dataclass(frozen=True)
class Ended:
    """How a row ended.

    Attributes:
        ids: The new tokens in order of their positions, the end token included.
        step_of_token: For each of `ids` the step of the row, from 0, in which it was kept.
        num_forwards: Forward passes that the row took part in.
        reason: "end" (an end token), "stop" (a stop string) or "length" (all gaps are filled).
        num_tokens_read: Tokens of the row that went through the model, over all passes: less than its length times
            `num_forwards` where a cache spares some. None where nobody counts them.
        blocks: Of block models alone.
    """

    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    reason: str
    num_tokens_read: int | None = None
    blocks: Blocks | None = None

    @property
    def tokens_per_forward(self) -> float:
        """New tokens, the end token included, over all passes."""
        return len(self.ids) / self.num_forwards


@dataclass(frozen=True)
class Progress:
    """What one step brought one row.

    Attributes:
        ticket: Which row.
        step: The row's own step, from 0.
        positions: Newly kept positions in the row, ascending.
        ids: Their tokens.
        confidence: How sure the model was of each, at most 1; may be empty where the job is not watched.
        reopened: Positions kept before that are open again.
        log_probs: Of each of `ids`, and its alternatives; empty where the job did not ask.
        ended: Not None in the row's last step.
        row: The row as it began, in its first step: gaps of unknown length have found theirs by then. None later.
        block: Of block models, the block that was denoised.
        block_step: Of block models, the step within that block, from 0.
    """

    ticket: int
    step: int
    positions: list[int]
    ids: list[int]
    confidence: list[float] = field(default_factory=list)
    reopened: list[int] = field(default_factory=list)
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    ended: Ended | None = None
    row: Row | None = None
    block: int | None = None
    block_step: int | None = None


OnStep = Callable[[Progress], None]
"""Called with every step of every row; the ticket is the row's place among those of the call, from 0."""


@runtime_checkable
class Engine(Protocol):
    """Rows come and go between steps; what becomes of one does not depend on the others. Used from one thread."""

    @property
    def num_running(self) -> int:
        """Rows that the next step reads, without those that wait."""

    @property
    def num_waiting(self) -> int:
        """Rows that wait for a place."""

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket. Raises UserError for a row that cannot be written."""

    def cancel(self, ticket: int) -> None:
        """Gives a row up, running or waiting; its place is free for the next step. Unknown tickets are no error."""

    def step(self) -> list[Progress]:
        """Fills free places, runs one forward pass, and reports on every row that took part."""


def run(engine: Engine, jobs: Sequence[Job], on_step: OnStep | None = None) -> Iterator[tuple[int, Ended]]:
    """Writes rows through an engine; yields (index into `jobs`, how it ended) in the order in which they end.

    All jobs are submitted first, so that one that is refused is refused before the first pass.

    Raises:
        UserError: As `Engine.submit`.
    """
    index_of = {engine.submit(job): index for index, job in enumerate(jobs)}
    while engine.num_running or engine.num_waiting:
        for progress in engine.step():
            index = index_of[progress.ticket]
            if on_step is not None:
                on_step(replace(progress, ticket=index))
            if progress.ended is not None:
                yield index, progress.ended


def refuse_batch_size(batch_size: int) -> None:
    """Raises UserError where no row would be taken at a time."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not accepted: it must be at least 1")
