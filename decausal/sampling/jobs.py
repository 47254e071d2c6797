"""What engines take and report: a row to write, what a step brought it, and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

from decausal.errors import UserError
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings

BATCH_SIZE = 16
"""Rows written together, by default."""

TokenLogProbs = tuple[float, list[tuple[int, float]]]
"""A token's log-probability, and the likeliest ids in its place with theirs."""


@dataclass(frozen=True)
class Job:
    """One row to write.

    Attributes:
        row: Given tokens and gaps. A prompt is a row with one gap at its end.
        settings: How its gaps are filled, and the strings that end it. `max_new_tokens` and `seed` are not used here:
            the gaps give the number of tokens, and `seed` below replaces the other.
        seed: The seed that the row draws from.
        end_token_ids: The row ends once one of these and everything before it are kept. Rows with text after a gap have
            none.
        is_watched: Whether every step reports how sure the model was.
        num_top_log_probs: Alternatives to report for every kept token. None reports no log-probabilities at all.
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
    """What a block model reports about a row apart from its tokens. Blocks are counted from the start of the row.

    Attributes:
        of_token: The block of each new token.
        step_of_token: The denoising step of each new token within its block, from 0.
        first: The block of the first new token.
        ids: All tokens of the row's whole blocks from position `first` * block size on. They include the end of the
            prompt and what was kept after the end of the text. The mask token stands where nothing was kept.
        steps: The step of each of `ids` within its block; -1 if given or not kept.
    """

    of_token: list[int]
    step_of_token: list[int]
    first: int
    ids: list[int]
    steps: list[int]


@dataclass(frozen=True)
class Drafts:
    """Figures of the drafts of one row, or of several, written by self-speculation.

    Attributes:
        num_verified: For first, second, ... drafts, how many had only right ones before them.
        num_right: How many of these were right themselves.
        passes: By the name of a shape, the passes that used it. The passes that read prompts are not among them.
        num_tokens: Tokens that these passes brought.
    """

    num_verified: tuple[int, ...] = ()
    num_right: tuple[int, ...] = ()
    passes: Mapping[str, int] = field(default_factory=dict)
    num_tokens: int = 0

    @property
    def acceptances(self) -> list[float]:
        """The shares of right ones, by position."""
        return [right / count for right, count in zip(self.num_right, self.num_verified, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """New tokens divided by passes; 0 if there were none."""
        return self.num_tokens / max(1, sum(self.passes.values()))

    @classmethod
    def sum(cls, each: Iterable[Drafts | None]) -> Drafts | None:
        """Returns the figures of several rows together. None if none of them was speculated."""
        found = [drafts for drafts in each if drafts is not None]
        if not found:
            return None
        verified, right = (
            tuple(map(sum, zip_longest(*(getattr(drafts, name) for drafts in found), fillvalue=0)))
            for name in ("num_verified", "num_right")
        )
        passes = sum((Counter(drafts.passes) for drafts in found), Counter())
        return cls(verified, right, passes, sum(drafts.num_tokens for drafts in found))

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for JSON."""
        return {
            "acceptance": [round(share, 4) for share in self.acceptances],
            "tokens_per_pass": round(self.tokens_per_pass, 4),
            "passes": dict(self.passes),
        }

    def __str__(self) -> str:
        """Returns the figures in one line for people."""
        shares = " ".join(f"{share:.2f}" for share in self.acceptances) or "none"
        shapes = ", ".join(sorted(self.passes, key=lambda name: -self.passes[name])[:2])
        return f"{self.tokens_per_pass:.2f} tokens per pass, drafts right {shares}, {shapes or 'no pass'}"


@dataclass(frozen=True)
class Ended:
    """How a row ended.

    Attributes:
        ids: The new tokens in order of their positions, including an end token.
        step_of_token: The row's step, from 0, in which each of `ids` was kept.
        num_forwards: Forward passes that the row took part in.
        reason: "end" (an end token), "stop" (a stop string) or "length" (all gaps are filled).
        num_tokens_read: Tokens of the row that went through the model, over all passes. With a cache, fewer than its
            length times `num_forwards`. None if not counted.
        blocks: Only for block models.
        drafts: Only for self-speculation.
        num_prefix_tokens: Given tokens whose keys and values a prefix cache held.
    """

    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    reason: str
    num_tokens_read: int | None = None
    blocks: Blocks | None = None
    drafts: Drafts | None = None
    num_prefix_tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """New tokens, including an end token, divided by passes."""
        return len(self.ids) / self.num_forwards


@dataclass(frozen=True)
class Progress:
    """The result of one step for one row.

    Attributes:
        ticket: The row's ticket.
        step: The row's own step, from 0.
        positions: Newly kept positions in the row, ascending.
        ids: Their tokens.
        confidence: How sure the model was of each, at most 1; may be empty if the job is not watched.
        reopened: Positions that were kept and are open again.
        log_probs: Log-probabilities of each of `ids` and its alternatives; empty if the job did not ask.
        ended: How the row ended, in its last step; else None.
        row: The row as it began, with the lengths of all gaps, in its first step; else None.
        block: The block that was denoised, for block models.
        block_step: The step within that block, from 0, for block models.
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
"""Called with every step of every row. The ticket is the row's index in the call, from 0."""


@runtime_checkable
class Engine(Protocol):
    """Rows come and go between steps, and do not influence each other. Used from one thread."""

    @property
    def num_running(self) -> int:
        """Rows that the next step reads, without those that wait."""

    @property
    def num_waiting(self) -> int:
        """Rows that wait for a place."""

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket. Raises UserError for a row that cannot be written."""

    def cancel(self, ticket: int) -> None:
        """Drops a row, running or waiting. Its place is free in the next step. Unknown tickets are ignored."""

    def step(self) -> list[Progress]:
        """Fills free places, runs one forward pass, and reports on every row that took part."""


def run(engine: Engine, jobs: Sequence[Job], on_step: OnStep | None = None) -> Iterator[tuple[int, Ended]]:
    """Writes rows through an engine. Yields (index into `jobs`, how it ended) in the order in which they end.

    All jobs are submitted first, so that a bad one is refused before the first pass.

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
    """Raises UserError if the batch size is below 1."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not accepted: it must be at least 1")
