"""What every engine takes and tells: one row wanted, what a step brought it, how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings

TokenLogProbs = tuple[float, list[tuple[int, float]]]
"""A token's log-probability, and the likeliest ids in its place with theirs."""


@dataclass(frozen=True)
class Job:
    """One row to write.

    Attributes:
        row: Given tokens and gaps; a prompt is a row whose one gap stands at its end.
        settings: How its gaps are filled, and the strings that end it. `max_new_tokens` and `seed` play no part.
        seed: What the row draws from.
        end_token_ids: The row ends once one of these is kept and all before it is kept too. Rows with text behind a
            gap have none.
        is_watched: Every step tells how sure the model was.
        num_top_log_probs: Alternatives to tell for every kept token; None tells no log-probabilities at all.
    """

    row: Row
    settings: SamplerSettings
    seed: int
    end_token_ids: tuple[int, ...] = ()
    is_watched: bool = False
    num_top_log_probs: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a row ended.

    Attributes:
        ids: The new tokens in order of their positions, the end token included.
        step_of_token: For each of `ids` the step, from 0, in which it was kept.
        num_forwards: Forward passes that the row took part in.
        reason: "end" (an end token), "stop" (a stop string) or "length" (all gaps are filled).
    """

    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    reason: str


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
        row: Told in the first step where it is not the job's: gaps of unknown length have found theirs.
    """

    ticket: int
    step: int
    positions: list[int]
    ids: list[int]
    confidence: list[float]
    reopened: list[int] = field(default_factory=list)
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    ended: Ended | None = None
    row: Row | None = None


@runtime_checkable
class Engine(Protocol):
    """Rows come and go between steps; what becomes of one does not depend on the others. Used from one thread."""

    @property
    def num_running(self) -> int:
        """Rows that the next step reads, those that wait left out."""

    @property
    def num_waiting(self) -> int:
        """Rows that wait for a place."""

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket. Raises UserError for a row that cannot be written."""

    def cancel(self, ticket: int) -> None:
        """Gives a row up, running or waiting; its place is free for the next step. Unknown tickets are no error."""

    def step(self) -> list[Progress]:
        """Fills free places, runs one forward pass, and tells of every row that took part."""


def run(engine: Engine, jobs: Sequence[Job]) -> Iterator[tuple[int, Ended]]:
    """Writes rows through an engine; yields (index into `jobs`, how it ended) in the order in which they end."""
    index_of = {engine.submit(job): index for index, job in enumerate(jobs)}
    while engine.num_running or engine.num_waiting:
        for progress in engine.step():
            if progress.ended is not None:
                yield index_of[progress.ticket], progress.ended
