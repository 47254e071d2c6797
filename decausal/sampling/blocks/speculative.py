"""Self-speculative decoding: masks draft several tokens, the same weights verify them causally, one pass does both.

A pass reads, for each row, the last known token and the tokens that the pass before has drafted for the positions after
it, all under causal attention; and groups of masks, which stand behind so many of these drafts as may turn out right.
The causal states say what the model itself writes, behind the known token and behind each draft. Drafts are right as
far as they are just that; the state behind the last right one adds a token. The group that stands behind exactly these
drafts has made the next ones. `draft_shapes` says which groups there are.

What is written is the causal model's own text, whatever the drafts: greedily its greedy text, and with temperature the
text that it draws with the same seed. Each position draws with a number of its own, a function of seed and position, so
the verifier's token depends on nothing else. A draft made from the same number most likely is that token.

Source: verifying drafts in one pass, Leviathan et al., Fast inference from transformers via speculative decoding (arXiv
2211.17192); one number for draft and verifier, Daliri et al., Coupling without communication and drafter-invariant
speculative decoding (arXiv 2408.07978), here by the inverse distribution function; masks as the drafter as in OPDLM
(arXiv 2606.06712).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from decausal.devices import choices
from decausal.errors import UserError
from decausal.models.block_cache import decoding, refuse_uncacheable
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.draft_shapes import DraftShape, linear, quadratic, strided
from decausal.sampling.blocks.draft_tables import DraftTables
from decausal.sampling.blocks.speculative_rows import Extent, Places, Read, SpeculativeRows
from decausal.sampling.defaults import longest_draft, refuse_for
from decausal.sampling.jobs import Ended, Job, Progress, TokenLogProbs
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.scoring import job_log_probs
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import tokens_to_stop

DRAFT_LENGTH = 4
"""Tokens drafted at once where the model has no blocks."""
_SHAPES = {"quadratic": quadratic, "strided": strided, "linear": linear}


class SpeculativeEngine:
    """Continues prompts as the weights under causal attention would, several tokens per pass.

    A step takes all rows whose prompts have been read one pass further. Rows that enter read their prompts in passes of
    their own, so many tokens with every step, and do not stop the others. What a row becomes does not depend on them.
    Of its settings temperature, `top_k`, `top_p`, `min_p`, `stop` and those of drafts hold; schedules play no part.

    Args:
        converted: Model, tokenizer (for stop texts alone) and facts: shift, mask token and block size. Any layout but
            "causal", under which masks draft nothing.
        max_rows: Rows in one forward pass.
        max_length: Longest row. Memory for `max_rows` of them is taken by the first pass.

    Raises:
        UserError: A causal layout, or a model that takes no such cache.
    """

    def __init__(self, converted: Converted, *, max_rows: int, max_length: int) -> None:
        self._model, self._tokenizer, self._facts = converted
        SamplerSettings(speculative=True).refuse_layout(self._facts.layout)
        self._max_rows, self._max_length, self._reads_causally = max_rows, max_length, converted.facts.causal_groups
        with decoding(self._model):
            refuse_uncacheable(self._model)
        self._device = self._model.get_input_embeddings().weight.device
        self._most_read = choices(self._device).prompt_tokens
        self._rows: SpeculativeRows | None = None
        self._held: list[_Running] = []
        self._num_ready = 0
        self._waiting: deque[_Running] = deque()
        self._gathered: tuple[tuple[int, ...], RowSettings] | None = None
        self._next_ticket = 0

    @property
    def num_running(self) -> int:
        """Rows that hold a place, or will in the next step."""
        return min(self._max_rows, len(self._held) + len(self._waiting))

    @property
    def num_waiting(self) -> int:
        """Rows that wait for one."""
        return len(self._held) + len(self._waiting) - self.num_running

    def submit(self, job: Job) -> int:
        """Takes a row on and returns its ticket.

        Raises:
            UserError: Text after a gap, no token to start from, more than `max_length`, or more drafts than the model
                has learnt.
        """
        row = job.row
        refuse_for(self._facts, job.settings)
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
        self._waiting.append(_Running(self._next_ticket, job, self._shape_of(job.settings)))
        return self._next_ticket

    def cancel(self, ticket: int) -> None:
        """Gives a row up, running or waiting."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        for row in [row for row in self._held if row.ticket == ticket]:
            self._drop(row)

    def step(self) -> list[Progress]:
        """Takes rows a pass further, and reads prompts of others in a second one; tells of all rows that took part."""
        with decoding(self._model):
            told = self._advance(self._held[: self._num_ready], most_given=1)
            self._admit()
            told += self._advance(self._to_read(), most_given=self._most_read)
        return told

    def _shape_of(self, settings: SamplerSettings) -> DraftShape:
        length = settings.draft_length
        if length is None:
            length = longest_draft(self._facts)
        return _SHAPES[settings.draft](DRAFT_LENGTH if length is None else length)

    def _admit(self) -> None:
        """Gives free places to rows that wait."""
        new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_rows - len(self._held)))]
        if not new:
            return
        self._use_shapes([*self._held, *new])
        for row in new:
            row.place = len(self._held)
            self._held.append(row)
            self._rows.admit(row.prompt, row.job.seed, self._index_of(row.shape))

    def _use_shapes(self, rows: list[_Running]) -> None:
        """Has the tables hold the shapes of all rows."""
        shapes = list(dict.fromkeys(row.shape for row in rows))
        if self._rows is not None and set(shapes) <= set(self._rows.tables.shapes):
            return
        tables = DraftTables(shapes, self._facts.shift, self._reads_causally, self._device)
        num_slots = self._max_length + 2 * tables.most_pending + 1 + tables.most_masks
        if self._rows is None:
            self._rows = SpeculativeRows(
                self._model, self._facts, tables=tables, max_rows=self._max_rows, num_slots=num_slots
            )
            return
        self._rows.make_room(num_slots)
        self._rows.use(tables, [shapes.index(row.shape) for row in self._held])

    def _index_of(self, shape: DraftShape) -> int:
        return self._rows.tables.shapes.index(shape)

    def _to_read(self) -> list[_Running]:
        """The rows whose prompts are read next, first come first, within the tokens that one pass may read."""
        found: list[_Running] = []
        width = 0
        for row in sorted(self._held[self._num_ready :], key=lambda row: row.ticket):
            width = max(width, min(row.num_unread, self._most_read))
            if found and width * (len(found) + 1) > self._most_read:
                break
            found.append(row)
        return found

    def _advance(self, rows: list[_Running], most_given: int) -> list[Progress]:
        """One pass over some rows."""
        if not rows:
            return []
        read = self._rows.read(self._places(rows), self._extent(rows, most_given), self._settings(rows))
        brought = [row[1 : 1 + row[0]] for row in read.told.tolist()]
        for row, tokens in zip(rows, brought, strict=True):
            self._note(row, tokens, most_given)
        log_probs = self._log_probs(rows, brought, read)
        told = [row.take(*each, self._tokenizer) for row, *each in zip(rows, brought, log_probs, strict=True)]
        for row, progress in zip(rows, told, strict=True):
            if progress.ended is not None:
                self._drop(row)
        return told

    def _places(self, rows: list[_Running]) -> Places:
        places = [row.place for row in rows]
        if places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return torch.tensor(places).to(self._device)

    def _extent(self, rows: list[_Running], most_given: int) -> Extent:
        """How much the rows read, as the device will find by itself; rows in turn are told what they draft."""
        verifies = any(row.shape.takes_turns and row.pending for row in rows)
        givens, drafts, masks, new, keys = [], [], [], [], []
        for row in rows:
            given = min(row.num_unread, most_given)
            waits = given < row.num_unread or (verifies and row.shape.takes_turns and not row.pending)
            row.drafts_now = not waits
            num_masks = 0 if waits else row.shape.num_masks(row.pending, self._facts.shift)
            givens.append(given)
            drafts.append(row.pending)
            masks.append(num_masks)
            new.append(0 if waits else max(row.shape.groups[row.pending]))
            keys.append(row.num_cached + given + row.pending + num_masks)
        return Extent(max(givens), max(drafts), max(masks), max(new), max(keys))

    def _note(self, row: _Running, tokens: list[int], most_given: int) -> None:
        """What a pass did to the row on the device; a row whose prompt has been read goes to those that are ready."""
        row.num_cached += min(row.num_unread, most_given)
        if not tokens:
            return
        num_right = len(tokens) - 1
        row.num_cached += num_right
        row.pending = row.shape.groups[row.pending][num_right] if row.drafts_now else 0
        if row.place < self._num_ready:
            return
        other = self._held[self._num_ready]
        if other is not row:
            self._rows.swap(row.place, other.place)
            self._held[row.place], self._held[other.place] = other, row
            row.place, other.place = other.place, row.place
        self._num_ready += 1

    def _drop(self, row: _Running) -> None:
        """Frees a place; the last row that is ready moves into it, and the last one of all into that one's."""
        place = row.place
        if place < self._num_ready:
            self._num_ready -= 1
            self._move(self._num_ready, place)
            place = self._num_ready
        self._move(len(self._held) - 1, place)
        self._held.pop()
        self._rows.num_rows -= 1

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._rows.move(source, target)
            self._held[target] = self._held[source]
            self._held[target].place = target

    def _settings(self, rows: list[_Running]) -> RowSettings:
        """The rows' settings as tensors, made anew only when other rows are read."""
        tickets = tuple(row.ticket for row in rows)
        if self._gathered is None or self._gathered[0] != tickets:
            self._gathered = (tickets, RowSettings.of([row.job.settings for row in rows], self._device))
        return self._gathered[1]

    def _log_probs(
        self, rows: list[_Running], brought: Sequence[Sequence[int]], read: Read
    ) -> list[list[TokenLogProbs]]:
        """Under causal attention."""
        return job_log_probs(
            [row.job for row in rows],
            brought,
            lambda place: read.states[place, : len(brought[place])],
            self._rows.head,
        )


@dataclass(eq=False)
class _Running:
    """A row as the host knows it: the new tokens, and for each of them the pass that brought it.

    Attributes:
        shape: Of its drafts.
        place: Among the rows that are held.
        num_cached: Known tokens whose keys and values are held.
        pending: Drafts.
        drafts_now: It drafts in the present pass.
    """

    ticket: int
    job: Job
    shape: DraftShape
    place: int = -1
    num_cached: int = 0
    pending: int = 0
    drafts_now: bool = True
    ids: list[int] = field(default_factory=list)
    pass_of_token: list[int] = field(default_factory=list)
    num_forwards: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.job.row.given[0]

    @property
    def num_unread(self) -> int:
        """Known tokens that the model has not read: the last one at least."""
        return len(self.prompt) + len(self.ids) - self.num_cached

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
