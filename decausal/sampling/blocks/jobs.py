"""Jobs for a block engine: what it tells of each step, and how sure the model was of what it kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decausal.errors import UserError
from decausal.models.backbone import head_of
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.recording import Recorder
from decausal.sampling.blocks.requests import Request, StepEvent
from decausal.sampling.jobs import Job, Progress, TokenLogProbs
from decausal.sampling.log_probs import token_log_probs
from decausal.sampling.settings import SamplerSettings


class BlockJobs:
    """A `BlockEngine` that takes jobs.

    Args:
        converted: Model, tokenizer and facts; the layout is "block", or "causal" for an autoregressive model.
        max_rows: Rows in one forward pass.
        max_length: Longest row; whole blocks of it are used.
        end_token_ids: Jobs end at these or at none.
        record: What records passes, see `BlockEngine`.
    """

    def __init__(
        self,
        converted: Converted,
        *,
        max_rows: int,
        max_length: int,
        end_token_ids: Sequence[int] = (),
        record: Recorder | None = None,
    ) -> None:
        converted.model.eval()
        self._engine = _Watched(
            converted.model,
            converted.facts,
            max_rows=max_rows,
            max_length=max_length,
            end_token_ids=end_token_ids,
            tokenizer=converted.tokenizer,
            record=record,
        )
        self._jobs: dict[int, Job] = {}
        self._num_passes: dict[int, int] = {}

    def record_ahead(self, settings: SamplerSettings) -> None:
        """See `BlockEngine.record_ahead`."""
        self._engine.record_ahead(settings)

    @property
    def num_running(self) -> int:
        """Rows that hold a place."""
        return min(self._engine.num_unfinished, self._engine.max_rows)

    @property
    def num_waiting(self) -> int:
        """Rows that wait for one."""
        return self._engine.num_unfinished - self.num_running

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket.

        Raises:
            UserError: Text behind a gap; end tokens that are not the engine's; what `BlockEngine.submit` refuses.
        """
        if len(job.row.gaps) > 1 or job.row.given[-1]:
            raise UserError(
                f"{job.row.name} has text behind a gap, which a model of layout '{self._engine.facts.layout}' cannot "
                "see: leave it out, or take a model of layout 'bidirectional'"
            )
        if job.end_token_ids != self._engine.end_token_ids:
            raise UserError(f"this engine ends rows at {self._engine.end_token_ids}, not at {job.end_token_ids}")
        settings = replace(job.settings, max_new_tokens=job.row.gaps[0])
        ticket = self._engine.submit(Request(job.row.given[0], settings, job.seed, job.row.name))
        self._jobs[ticket], self._num_passes[ticket] = job, 0
        if job.is_watched or job.num_top_log_probs is not None:
            self._engine.watched[ticket] = job.num_top_log_probs or 0
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives a row up, running or waiting."""
        self._engine.cancel(ticket)
        self._forget(ticket)

    def step(self) -> list[Progress]:
        """Fills free places, runs one pass, and tells of every row that took part."""
        return [self._progress(event) for event in self._engine.step()]

    def _progress(self, event: StepEvent) -> Progress:
        job, finished = self._jobs[event.ticket], event.finished
        stop = len(job.row.given[0]) + (job.row.gaps[0] if finished is None else len(finished.ids))
        # The last block is written whole; what lies behind the end of the text is nobody's.
        wanted = [i for i, position in enumerate(event.positions) if position < stop]
        log_probs = self._engine.log_probs.get(event.ticket, [])
        number = self._num_passes[event.ticket]
        self._num_passes[event.ticket] += 1
        if finished is not None:
            self._forget(event.ticket)
        return Progress(
            ticket=event.ticket,
            step=number,
            positions=[event.positions[i] for i in wanted],
            ids=[event.ids[i] for i in wanted],
            confidence=[math.exp(log_probs[i][0]) for i in wanted] if log_probs else [],
            log_probs=[log_probs[i] for i in wanted] if log_probs and job.num_top_log_probs is not None else [],
            ended=None if finished is None else finished.ended,
        )

    def _forget(self, ticket: int) -> None:
        self._jobs.pop(ticket, None)
        self._num_passes.pop(ticket, None)
        self._engine.watched.pop(ticket, None)


class _Watched(BlockEngine):
    """Also tells how probable the kept tokens of chosen rows were, at the cost of the head at those tokens.

    Attributes:
        watched: Tickets of these rows, to the number of alternatives that are told.
        log_probs: By ticket, of the tokens kept in the last step.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.watched: dict[int, int] = {}
        self.log_probs: dict[int, list[TokenLogProbs]] = {}

    def _take_note(self, told: list[list[int]], wants_events: bool) -> list[StepEvent]:
        places = {row.ticket: place for place, row in enumerate(self._active) if row.ticket in self.watched}
        events = super()._take_note(told, wants_events)
        self.log_probs = {}
        watched = [event for event in events if event.ticket in places and event.positions]
        if watched:
            states = torch.cat([self._states_of(places[event.ticket], event) for event in watched])
            head = head_of(self.model)._replace(banned=self.facts.mask_token_id)
            tokens = [token for event in watched for token in event.ids]
            counts = [self.watched[event.ticket] for event in watched for _ in event.ids]
            found = iter(token_log_probs(states, head, tokens, counts))
            self.log_probs = {event.ticket: [next(found) for _ in event.ids] for event in watched}
        return events

    def _states_of(self, place: int, event: StepEvent) -> Float[Tensor, "n D"]:
        offsets = [position % self.block_size for position in event.positions]
        return self._states[place, offsets]
