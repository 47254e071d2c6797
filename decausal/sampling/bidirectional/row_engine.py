"""An engine for whole rows that come and go between denoising steps, each with its own settings, seed and step."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from decausal.errors import UserError
from decausal.models.block_cache import decoding
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.bidirectional.denoiser import Denoiser, OpenRows, Step
from decausal.sampling.borders import Allowed, AllowedTokens
from decausal.sampling.jobs import Ended, Job, Progress, TokenLogProbs
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.scoring import token_log_probs
from decausal.sampling.stopping import tokens_to_stop


@dataclass
class _Running:
    """A row in a place of the batch, as the host knows it."""

    place: int
    ticket: int
    job: Job
    span: range  # from its first open position to its last
    ids: dict[int, int]  # by position: given and kept tokens of the span
    num_final: int = 0  # tokens of the span before the first open position, when last checked
    step: int = 0
    num_forwards: int = 0
    step_of: dict[int, int] = field(default_factory=dict)


class _Step(NamedTuple):
    """What a pass decided, on the host: one list per row that took part."""

    new: list[list[tuple[int, int, float]]]  # position, token, score
    reopened: list[list[int]]
    log_probs: dict[tuple[int, int], TokenLogProbs]  # by row and position


class RowEngine:
    """Denoises up to `max_rows` rows together. Others wait until a row ends.

    Each step runs the body over the rows in its places, and the head at the masked positions of their current windows.
    With `settings.remask` "p2" the head also runs at kept positions. It proposes a token for each masked position and
    keeps the best. The mask token is never drawn. A row is a function of its own ids, seed and settings. It depends
    neither on other rows, nor on padding, nor on when it was submitted.

    Args:
        converted: Model, tokenizer and facts; the layout is "bidirectional" or "causal".
        max_rows: Rows in one forward pass.
        max_length: Longest row.
    """

    def __init__(self, converted: Converted, *, max_rows: int, max_length: int) -> None:
        self._model, self._tokenizer, self._facts = converted
        refuse_blocks(self._facts)
        self._denoiser = Denoiser(self._model, self._facts, max_rows)
        self._max_length = max_length
        self._places: list[_Running | None] = [None] * max_rows
        self._waiting: deque[tuple[int, Job]] = deque()
        self._next_ticket = 0
        self._gathered: tuple[tuple[int, ...], RowSettings] | None = None
        device = next(self._model.parameters()).device
        shape = (max_rows, max_length)
        self._ids = torch.zeros(shape, dtype=torch.long, device=device)
        self._is_open = torch.zeros(shape, dtype=torch.bool, device=device)
        self._is_masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self._document_ids = torch.zeros(shape, dtype=torch.long, device=device)
        self._allowed = AllowedTokens(self._tokenizer, len(self._denoiser.head.weight), device)
        self._allowed_index = torch.full(shape, -1, device=device)
        self._seeds = torch.zeros(max_rows, dtype=torch.long, device=device)
        self._steps, self._num_read = torch.zeros(2, max_rows, dtype=torch.long, device=device)

    @property
    def num_running(self) -> int:
        """Rows that have a place, or get one in the next step."""
        return min(len(self._places), self._num_unfinished)

    @property
    def num_waiting(self) -> int:
        """Rows that wait for one."""
        return self._num_unfinished - self.num_running

    @property
    def _num_unfinished(self) -> int:
        return len(self._waiting) + sum(place is not None for place in self._places)

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket.

        Raises:
            UserError: It is longer than `max_length`, no state predicts its first position, or its settings do not fit
                this layout.
        """
        job.settings.refuse_speculative()
        job.settings.refuse_layout(self._facts.layout, self._facts.shift)
        if job.row.length > self._max_length:
            raise UserError(
                f"{job.row.name} makes a row of {job.row.length} tokens, and this engine takes at most "
                f"{self._max_length}: shorten it, or write less"
            )
        if self._facts.shift == 1 and not job.row.given[0]:
            raise UserError(
                f"{job.row.name} begins with a gap, and with shift 1 no state predicts a first token: give one first"
            )
        self._next_ticket += 1
        self._waiting.append((self._next_ticket, job))
        return self._next_ticket

    def cancel(self, ticket: int) -> None:
        """Drops a row, running or waiting."""
        self._places = [None if place and place.ticket == ticket else place for place in self._places]
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != ticket)

    def step(self) -> list[Progress]:
        """Fills free places, takes all rows one step further, and reports on each."""
        with decoding(self._model):
            self._admit()
            places = [place for place, running in enumerate(self._places) if running is not None]
            return self._advance(places) if places else []

    def _admit(self) -> None:
        """Fills free places with waiting rows, and writes all of them to the device at once."""
        free = [place for place, running in enumerate(self._places) if running is None]
        new = [(place, *self._waiting.popleft()) for place in free[: len(self._waiting)]]
        if not new:
            return
        shape, mask_token_id = (len(new), self._max_length), self._facts.mask_token_id
        ids, allowed = torch.full(shape, mask_token_id), torch.full(shape, -1)
        is_open, document_ids = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
        for i, (place, ticket, job) in enumerate(new):
            row, spans = job.row, job.row.spans()
            whole = row.ids(mask_token_id)
            ids[i, : row.length] = torch.tensor(whole)
            document_ids[i, : row.length] = 0
            for span in spans:
                is_open[i, span.start : span.stop] = True
            for position, which in self._allowed.numbers(spans, row.borders).items():
                allowed[i, position] = which
            span = range(spans[0].start, spans[-1].stop)
            given = {position: whole[position] for position in set(span).difference(*spans)}
            self._places[place] = _Running(place, ticket, job, span, given)
            self._denoiser.forget(place)
        index = torch.tensor([place for place, _, _ in new], device=self._ids.device)
        seeds = torch.tensor([job.seed for _, _, job in new])
        for held, values in (
            (self._ids, ids),
            (self._is_open, is_open),
            (self._is_masked, is_open),
            (self._document_ids, document_ids),
            (self._allowed_index, allowed),
            (self._seeds, seeds),
        ):
            held[index] = values.to(held.device)
        self._steps[index] = 0

    def _advance(self, places: list[int]) -> list[Progress]:
        rows = [running for running in (self._places[place] for place in places) if running is not None]
        step = self._forward(places, rows)
        progresses = []
        for i, (place, running) in enumerate(zip(places, rows, strict=True)):
            progress = self._progress(running, i, step)
            if progress.ended is not None:
                self._places[place] = None
            progresses.append(progress)
        return progresses

    def _forward(self, places: list[int], rows: list[_Running]) -> _Step:
        lengths = [running.job.row.length for running in rows]
        index, length = torch.tensor(places, device=self._ids.device), max(lengths)
        has_borders = any(running.job.row.has_borders for running in rows)
        open_rows = OpenRows(
            ids=self._ids[index, :length],
            is_open=self._is_open[index, :length],
            is_masked=self._is_masked[index, :length],
            document_ids=self._document_ids[index, :length],
            seeds=self._seeds[index],
            steps=self._steps[index],
            places=index,
            settings=self._settings(rows),
            is_whole=min(lengths) == length,
            allowed=Allowed(self._allowed_index[index, :length], self._allowed.tokens) if has_borders else None,
        )
        step = self._denoiser.advance(open_rows)
        self._ids[index, :length] = open_rows.ids
        self._is_masked[index, :length] = open_rows.is_masked
        self._steps[index] = open_rows.steps
        self._num_read[index] += step.num_tokens_read
        new, reopened = _by_row(step, open_rows.ids)
        return _Step(new, reopened, self._log_probs(rows, step, open_rows.ids))

    def _settings(self, rows: list[_Running]) -> RowSettings:
        """Returns the rows' settings as tensors. They are rebuilt only if other rows run."""
        tickets = tuple(running.ticket for running in rows)
        if self._gathered is None or self._gathered[0] != tickets:
            settings = RowSettings.of([running.job.settings for running in rows], self._ids.device)
            self._gathered = (tickets, settings)
        return self._gathered[1]

    def _log_probs(
        self, rows: list[_Running], step: Step, ids: Int[Tensor, "A T"]
    ) -> dict[tuple[int, int], TokenLogProbs]:
        """Returns log-probabilities by (row, position), for newly kept tokens of rows that ask. Guidance, temperature
        and truncation do not count."""
        wanted = [running.job.num_top_log_probs for running in rows]
        if all(count is None for count in wanted):
            return {}
        length = ids.shape[1]
        does_ask = torch.tensor([count is not None for count in wanted], device=ids.device)
        asked = (step.is_new.flatten()[step.index] & does_ask[step.index // length]).nonzero().squeeze(1)
        places = step.index[asked]
        rows_and_positions = [divmod(place, length) for place in places.tolist()]
        counts = [wanted[row] or 0 for row, _ in rows_and_positions]
        head, tokens = self._denoiser.head, ids.flatten()[places].tolist()
        found = token_log_probs(step.states[asked], head, tokens, counts)
        return dict(zip(rows_and_positions, found, strict=True))

    def _progress(self, running: _Running, row: int, step: _Step) -> Progress:
        for position in step.reopened[row]:
            del running.ids[position], running.step_of[position]
        for position, token, _ in step.new[row]:
            running.ids[position], running.step_of[position] = token, running.step
        number, running.step = running.step, running.step + 1
        running.num_forwards += 1 if running.job.settings.guidance == 0 else 2
        return Progress(
            ticket=running.ticket,
            step=number,
            positions=[position for position, _, _ in step.new[row]],
            ids=[token for _, token, _ in step.new[row]],
            confidence=[_as_confidence(score, running.job) for _, _, score in step.new[row]],
            reopened=step.reopened[row],
            log_probs=[step.log_probs[row, position] for position, _, _ in step.new[row] if step.log_probs]
            if running.job.num_top_log_probs is not None
            else [],
            ended=self._ended(running),
            row=running.job.row if number == 0 else None,
        )

    def _ended(self, running: _Running) -> Ended | None:
        """Returns how the row ends, if it does: at the first end or stop with nothing open before it, or when it is
        full."""
        span, settings = running.span, running.job.settings
        before = 0 if settings.remask else running.num_final
        length = before
        while length < len(span) and span[length] in running.ids:
            length += 1
            if running.ids[span[length - 1]] in running.job.end_token_ids:
                return self._cut(running, length, "end")
        running.num_final = length
        if len(running.ids) == len(span):
            return self._cut(running, length, "length")
        if settings.has_stops and not settings.remask and length > before:
            stopped = self._length_at_stop(running, length)
            return None if stopped is None else self._cut(running, stopped, "stop")
        return None

    def _length_at_stop(self, running: _Running, length: int) -> int | None:
        final = [running.ids[position] for position in running.span[:length]]
        return tokens_to_stop(self._tokenizer, running.job.row.given[0], final, 0, running.job.settings)

    def _cut(self, running: _Running, length: int, reason: str) -> Ended:
        if reason != "stop" and (stopped := self._length_at_stop(running, length)) is not None:
            length, reason = stopped, "stop"
        written = [position for position in running.span[:length] if position in running.step_of]
        return Ended(
            ids=[running.ids[position] for position in written],
            step_of_token=[running.step_of[position] for position in written],
            num_forwards=running.num_forwards,
            reason=reason,
            num_tokens_read=int(self._num_read[running.place]),
        )


def refuse_blocks(facts: ConversionFacts) -> None:
    """Refuses models that are not denoised in whole rows.

    Raises:
        UserError: A "block" layout.
    """
    if facts.layout == "block":
        raise UserError(
            f"this model has layout 'block' (block size {facts.block_size}): it is denoised block by block, not as "
            "whole rows; use generate, or engine_for, which finds the engine that fits"
        )


def _as_confidence(score: float, job: Job) -> float:
    """Rows with an entropy bound are ordered by minus the entropy. Its exponential is a confidence."""
    return score if job.settings.entropy_bound is None else math.exp(score)


def _by_row(step: Step, tokens: Int[Tensor, "A T"]) -> tuple[list[list[tuple[int, int, float]]], list[list[int]]]:
    """Copies what a step did to the host in one piece.

    Returns:
        For each row, (position, token, score) of new tokens, and the positions that are open again.
    """
    parts = [step.is_new, tokens, step.scores]
    if step.is_reopened is not None:
        parts.append(step.is_reopened)
    numbers = torch.stack([part.double() for part in parts]).cpu().numpy()  # exact, in 64 bits
    is_new, of_row, scores = numbers[0] > 0, numbers[1].astype(int), numbers[2]
    new: list[list[tuple[int, int, float]]] = [[] for _ in tokens]
    for row, position in zip(*(place.tolist() for place in is_new.nonzero()), strict=True):
        new[row].append((position, int(of_row[row, position]), float(scores[row, position])))
    if step.is_reopened is None:
        return new, [[] for _ in tokens]
    return new, [row.nonzero()[0].tolist() for row in numbers[3]]
