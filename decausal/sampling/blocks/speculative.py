"""Self-speculative decoding: masks draft several tokens, the same weights verify them causally, one pass does both.

A pass reads, for each row, the last known token and the m tokens that the pass before has drafted for the positions
after it, all under causal attention; and for each number of drafts that may turn out right, a group of masks behind
that many drafts. The causal states say how many drafts are right and add one token of their own; of the groups, the one
that stands behind exactly the right drafts has made the next ones. So no pass only drafts and none only verifies, and a
pass brings between 1 and m + 1 tokens, for (m + 1) (m + 1) more queries than one token costs.

What is written is the causal model's own: greedily its greedy text, token for token; with temperature a sample from its
distribution. The quality of drafts decides the speed alone.

Source: rejection sampling, Leviathan et al., Fast inference from transformers via speculative decoding (arXiv
2211.17192); masks as the drafter as in OPDLM (arXiv 2606.06712). One group per number of right drafts is ours.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from decausal.errors import UserError
from decausal.models.block_cache import decoding, refuse_uncacheable
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.speculative_rows import Read, SpeculativeRows
from decausal.sampling.jobs import Ended, Job, Progress, TokenLogProbs
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.scoring import job_log_probs
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import tokens_to_stop

DRAFT_LENGTH = 4
"""Tokens drafted at once where the model has no blocks."""


class SpeculativeEngine:
    """Continues prompts as the weights under causal attention would, several tokens per pass.

    Rows that enter read their prompts in a pass of their own; then all rows go on together, before others enter. What a
    row becomes does not depend on the others. Of its settings temperature, `top_k`, `top_p` and `stop` hold; schedules
    play no part.

    Args:
        converted: Model, tokenizer (for stop texts alone) and facts: shift, mask token and block size. Any layout but
            "causal", under which masks draft nothing.
        max_rows: Rows in one forward pass.
        max_length: Longest row. Memory for `max_rows` of them is taken by the first pass.
        draft_length: m; by default the block size, or `DRAFT_LENGTH`.

    Raises:
        UserError: A causal layout, a model that takes no such cache, or a draft length below 1.
    """

    def __init__(
        self, converted: Converted, *, max_rows: int, max_length: int, draft_length: int | None = None
    ) -> None:
        self._model, self._tokenizer, self._facts = converted
        SamplerSettings(speculative=True).refuse_layout(self._facts.layout)
        draft_length = self._facts.block_size or DRAFT_LENGTH if draft_length is None else draft_length
        if draft_length < 1:
            raise UserError(f"draft_length={draft_length} is not accepted: it must be at least 1")
        self._max_rows, self._max_length = max_rows, max_length
        with decoding(self._model):
            refuse_uncacheable(self._model)
        self._rows = SpeculativeRows(
            self._model, self._facts, draft_length=draft_length, max_rows=max_rows, max_length=max_length
        )
        self._running: list[_Running] = []
        self._waiting: deque[_Running] = deque()
        self._gathered: tuple[tuple[int, ...], RowSettings] | None = None
        self._has_admitted = False
        self._next_ticket = 0

    @property
    def num_running(self) -> int:
        """Rows that hold a place, or will in the next step."""
        return min(self._max_rows, len(self._running) + len(self._waiting))

    @property
    def num_waiting(self) -> int:
        """Rows that wait for one."""
        return len(self._running) + len(self._waiting) - self.num_running

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket.

        Raises:
            UserError: Text after a gap, no token to start from, or more than `max_length`.
        """
        row = job.row
        if len(row.gaps) > 1 or row.given[-1]:
            raise UserError(
                f"{row.name} has text after a gap, and speculative decoding writes from left to right: leave one of "
                "them out"
            )
        if not row.given[0]:
            raise UserError(f"{row.name} is empty: speculative decoding needs at least one token to start from")
        if row.length > self._max_length:
            raise UserError(
                f"{row.name} makes a row of {row.length} tokens, and this engine takes at most {self._max_length}: "
                "shorten it, or write less"
            )
        self._next_ticket += 1
        self._waiting.append(_Running(self._next_ticket, job))
        return self._next_ticket

    def cancel(self, ticket: int) -> None:
        """Gives a row up, running or waiting."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        for place, row in enumerate(self._running):
            if row.ticket == ticket:
                self._drop(place)
                return

    def step(self) -> list[Progress]:
        """Reads the prompts of rows that find a free place, or takes all rows further; tells of those that it read."""
        first = self._admit()
        places, is_new = slice(first, len(self._running)), self._has_admitted
        rows = self._running[places]
        if not rows:
            return []
        with decoding(self._model):
            read = self._rows.read(places, [row.length for row in rows], self._settings(rows), is_new=is_new)
            log_probs = self._log_probs(rows, read)
        told = [row.take(*brought, self._tokenizer) for row, *brought in zip(rows, read.tokens, log_probs, strict=True)]
        for place in reversed(range(len(told))):
            if told[place].ended is not None:
                self._drop(places.start + place)
        return told

    def _admit(self) -> int:
        """Gives free places to rows that wait; returns the first place that the next pass reads."""
        first = len(self._running)
        if not (self._has_admitted and self._running):
            for row in [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_rows - first))]:
                self._rows.admit(row.prompt, row.job.seed)
                self._running.append(row)
        self._has_admitted = len(self._running) > first
        return first if self._has_admitted else 0

    def _drop(self, place: int) -> None:
        """Frees a place; the last row moves into it."""
        self._rows.drop(place)
        last = self._running.pop()
        if place < len(self._running):
            self._running[place] = last

    def _settings(self, rows: list[_Running]) -> RowSettings:
        """The rows' settings as tensors, made anew only when other rows are read."""
        tickets = tuple(row.ticket for row in rows)
        if self._gathered is None or self._gathered[0] != tickets:
            settings = RowSettings.of([row.job.settings for row in rows], self._rows.ids.device)
            self._gathered = (tickets, settings)
        return self._gathered[1]

    def _log_probs(self, rows: list[_Running], read: Read) -> list[list[TokenLogProbs]]:
        """Under causal attention."""
        return job_log_probs(
            [row.job for row in rows],
            read.tokens,
            lambda place: read.states[place, : len(read.tokens[place])],
            self._rows.head,
        )


@dataclass
class _Running:
    """A row as the host knows it: the new tokens, and for each of them the pass that brought it."""

    ticket: int
    job: Job
    ids: list[int] = field(default_factory=list)
    pass_of_token: list[int] = field(default_factory=list)
    num_forwards: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.job.row.given[0]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    def take(self, tokens: list[int], log_probs: list[TokenLogProbs], tokenizer: Any) -> Progress:
        """Adds what a pass brought, up to an end token, a stop text or the limit."""
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
            ended=None if reason is None else Ended(self.ids, self.pass_of_token, self.num_forwards, reason),
            row=self.job.row if step == 0 else None,
        )

    def _extend(self, tokens: list[int], tokenizer: Any) -> str | None:
        """Returns why the row is over; None: it is not."""
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
