"""Decoding of block models, and of autoregressive models as blocks of one token, many rows in one batch.

Each pass reads, per row, the tokens that are not in the cache yet and the open block. A finished block is committed by
the pass that takes the next block's first step. So n denoising steps cost n passes.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.backbone import denoising_head, stock_model
from decausal.models.block_cache import BlockCache, decoding, refuse_uncacheable
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import Head
from decausal.sampling.blocks.active_row import ActiveRow
from decausal.sampling.blocks.keeping import keep
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.blocks.recorded_passes import RecordedPasses
from decausal.sampling.blocks.recording import PassRecorder
from decausal.sampling.blocks.rows import BlockRows, NewRow
from decausal.sampling.jobs import Job, Progress, TokenLogProbs
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.scoring import job_log_probs
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import refuse_for
from decausal.wording import quantity

GROWTH = 128
"""The fewest slots by which a cache without a given length grows."""


class BlockEngine:
    """Writes rows block by block, `max_rows` at a time. Others wait in a queue.

    A row is a function of its prompt, settings and seed. Other rows, padding and the time of submission do not matter.
    The model stays the caller's: its weights are read in every pass, so it can be trained between calls.

    Args:
        model: Any stock causal LM, or a PEFT wrapper around one. In eval mode while it decodes.
        facts: Layout, block size, shift, mask token. A "causal" layout is decoded as blocks of one token with shift 1.
        max_rows: Rows decoded together.
        max_length: Most tokens of a row, in whole blocks, for which memory is allocated now. None: the model's context,
            with memory that grows with the rows.
        tokenizer: Only needed for stop texts.
        is_fused: False commits each block in a separate pass: one more pass per block, the same tokens.
        record: What records repeated passes: `CudaGraphs()` on a GPU. The weights must then stay at their addresses,
            but may change in place.
        is_compiled: Whether the decoder layers of these passes are compiled, see `RecordedPasses`.

    Raises:
        UserError: A bidirectional layout, a model that does not take the cache, or no room for a block.

    Example:
        >>> engine = BlockEngine(model, facts, max_rows=16)
        >>> settings = SamplerSettings(threshold=0.9)
        >>> jobs = [Job(Row((ids, []), (64,), "the prompt"), settings, seed=0, end_token_ids=(0,)) for ids in prompts]
        >>> for index, ended in run(engine, jobs):
        ...     print(index, ended.ids, ended.tokens_per_forward)
    """

    def __init__(
        self,
        model: Any,
        facts: ConversionFacts,
        *,
        max_rows: int,
        max_length: int | None = None,
        tokenizer: Any = None,
        is_fused: bool = True,
        record: PassRecorder | None = None,
        is_compiled: bool = False,
    ) -> None:
        if max_rows < 1:
            raise UserError(f"max_rows={max_rows} is not accepted: it must be at least 1")
        self.model, self.facts, self.tokenizer = model, facts, tokenizer
        self.max_rows, self.is_fused = max_rows, is_fused
        self.layout, self.shift = _as_blocks(facts)
        config = stock_model(model).base_model.config
        self.capacity = _capacity(context_length(config), max_length, self.block_size)
        with decoding(model):
            refuse_uncacheable(model)
        device = stock_model(model).get_input_embeddings().weight.device
        length = 0 if max_length is None else self.capacity
        cache = BlockCache(config, max_rows, length)
        rows = BlockRows(max_rows, length, self.block_size, facts.mask_token_id, device)
        self._reader, self._rows, self._cache = Reader(model, self.layout, self.shift, cache, rows), rows, cache
        self._queue: deque[ActiveRow] = deque()
        self._active: list[ActiveRow] = []
        self._settings: RowSettings | None = None
        self._next_ticket = 0
        self._recorded: RecordedPasses | None = None
        if record is not None:
            self._recorded = RecordedPasses(self._reader, self._head, record, is_compiled)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.layout.block_size

    @property
    def num_running(self) -> int:
        """Rows that hold a place, or will in the next step."""
        return min(self.max_rows, len(self._active) + len(self._queue))

    @property
    def num_waiting(self) -> int:
        """Rows that wait for one."""
        return len(self._active) + len(self._queue) - self.num_running

    def submit(self, job: Job) -> int:
        """Queues a row and returns its ticket.

        Raises:
            UserError: Text after a gap, a prompt that holds the mask token or leaves no room, remasking, speculation,
                or stop texts without a tokenizer.
        """
        self._refuse(job)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._queue.append(ActiveRow(ticket, job, self.block_size))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Drops a row, waiting or running; it never ends."""
        self._queue = deque(row for row in self._queue if row.ticket != ticket)
        for place, row in enumerate(self._active):
            if row.ticket == ticket:
                self._release([place])
                return

    def step(self) -> list[Progress]:
        """Fills free places from the queue, runs one pass over the running rows, and reports on each of them."""
        with decoding(self.model):
            return self._advance()

    def _advance(self) -> list[Progress]:
        self._admit()
        active = self._active
        if not active:
            return []
        if not self.is_fused and not self._reader.is_autoregressive:
            self._commit()
        if self._recorded is not None:
            self._read_prompts()
        states, outcome = self._pass_over([row.unread for row in active])
        self._set_committed()
        return self._take_note(outcome.tolist(), states)

    def _pass_over(self, spans: list[range]) -> tuple[Float[Tensor, "b K D"], Int[Tensor, "b outcome"]]:
        if self._recorded is not None:
            found = self._recorded.run(spans, self._settings)
            if found is not None:
                return found
        states = self._reader.predict(spans)
        num_eligible = sum(row.num_eligible for row in self._active)
        return states, keep(self._rows, len(spans), num_eligible, states, self._head(), self._settings)

    def _read_prompts(self) -> None:
        """Reads what is too wide for recorded passes in a separate pass, so that the other rows can use a recorded
        one."""
        spans = [
            range(row.committed, row.start) if len(row.unread) > 2 * self.block_size else range(0)
            for row in self._active
        ]
        if not any(spans):
            return
        self._reader.commit(spans)
        for place, (row, span) in enumerate(zip(self._active, spans, strict=True)):
            if span:
                self._rows.committed[place] = self._rows.start[place]
                row.committed = row.start
                row.num_forwards += 1

    def record_ahead(self, settings: SamplerSettings, num_ends: int) -> None:
        """Records the passes for rows with these settings, if `record` and a length were given.

        Args:
            settings: Of the rows.
            num_ends: The most tokens that end a row.

        Raises:
            CannotRecordError: The model does something that cannot be recorded.
        """
        if self._recorded is not None and self._cache.max_length:
            self._make_room_for_ends(num_ends)
            with decoding(self.model):
                self._recorded.record_ahead(settings)

    def _head(self) -> Head:
        return denoising_head(self.model, self.facts.mask_token_id)

    def _commit(self) -> None:
        """Commits finished blocks in separate passes."""
        spans = [range(row.committed, row.start) for row in self._active]
        if any(spans):
            self._reader.commit(spans)
            for row, span in zip(self._active, spans, strict=True):
                row.num_forwards += len(span) > 0
            self._set_committed()

    def _set_committed(self) -> None:
        if any(row.committed != row.start for row in self._active):
            here = slice(0, len(self._active))
            self._rows.committed[here] = self._rows.start[here]
            for row in self._active:
                row.committed = row.start

    def _take_note(self, outcome: list[list[int]], states: Float[Tensor, "b K D"]) -> list[Progress]:
        """Updates the host's view. Rows whose block is done end or move to the next block."""
        size = self.block_size
        kept = [
            [offset for offset in range(size) if news[size + offset] == row.step]
            for row, news in zip(self._active, outcome, strict=True)
        ]
        log_probs = self._log_probs(kept, outcome, states)
        is_done = [not news[2 * size + 1] for news in outcome]
        steps = [
            self._progress(row, news, offsets, found, done)
            for row, news, offsets, found, done in zip(self._active, outcome, kept, log_probs, is_done, strict=True)
        ]
        if any(is_done):
            self._rows.next_blocks(len(outcome), is_done)
        self._release([place for place, step in enumerate(steps) if step.ended is not None])
        return steps

    def _progress(
        self, row: ActiveRow, news: list[int], offsets: list[int], log_probs: list[TokenLogProbs], is_done: bool
    ) -> Progress:
        """Takes in one row's share of a pass."""
        size, start, step, row_step = self.block_size, row.start, row.step, row.row_step
        row.note_step(num_eligible=news[2 * size])
        ended = row.end_block(news[:size], news[size : 2 * size], self.tokenizer) if is_done else None
        # The last block is written whole. Tokens after the end of the text are not reported.
        stop = row.limit if ended is None else row.prompt_length + len(ended.ids)
        offsets = [offset for offset in offsets if start + offset < stop]
        log_probs = log_probs[: len(offsets)]
        return Progress(
            ticket=row.ticket,
            step=row_step,
            positions=[start + offset for offset in offsets],
            ids=[news[offset] for offset in offsets],
            confidence=[math.exp(log_prob) for log_prob, _ in log_probs],
            log_probs=log_probs if row.job.num_top_log_probs is not None else [],
            ended=ended,
            row=row.job.row if row_step == 0 else None,
            block=start // size,
            block_step=step,
        )

    def _log_probs(
        self, kept: list[list[int]], outcome: list[list[int]], states: Float[Tensor, "b K D"]
    ) -> list[list[TokenLogProbs]]:
        tokens = [[news[offset] for offset in offsets] for news, offsets in zip(outcome, kept, strict=True)]
        jobs = [row.job for row in self._active]
        return job_log_probs(jobs, tokens, lambda place: states[place, kept[place]], self._head())

    def _admit(self) -> None:
        """Fills free places from the queue and writes what is new to the device."""
        while self._queue and len(self._active) < self.max_rows:
            self._active.append(self._queue.popleft())
            self._settings = None
        if self._settings is None:
            self._settings = RowSettings.of([row.job.settings for row in self._active], self._rows.device)
        new = [(place, row) for place, row in enumerate(self._active) if row.is_new]
        if not new:
            return
        longest = max(row.length for _, row in new)
        if longest > self._cache.max_length:
            length = max(longest, min(self.capacity, self._cache.max_length + GROWTH))
            self._cache.grow(length)
            self._rows.grow(length)
            self._forget_recordings()
        self._make_room_for_ends(max(len(row.job.end_token_ids) for _, row in new))
        self._rows.admit([self._new_row(place, row) for place, row in new])
        for _, row in new:
            row.is_new = False

    def _new_row(self, place: int, row: ActiveRow) -> NewRow:
        job = row.job
        is_first_alone = job.settings.first_token_from_clean
        return NewRow(place, row.prompt, row.limit, job.seed, is_first_alone, job.end_token_ids)

    def _make_room_for_ends(self, num_ends: int) -> None:
        if num_ends > self._rows.ends.shape[1]:
            self._rows.grow_ends(num_ends)
            self._forget_recordings()

    def _forget_recordings(self) -> None:
        """If tensors have moved, passes are recorded again."""
        if self._recorded is not None:
            self._recorded.forget()

    def _release(self, places: list[int]) -> None:
        """Gives places to rows of the queue. The last rows move into places that stay free."""
        for place in reversed(places):
            self._settings = None
            if self._queue:
                self._active[place] = self._queue.popleft()
                continue
            row = self._active.pop()
            last = len(self._active)
            if place != last:
                self._active[place] = row
                self._rows.move(last, place)
                self._cache.move_row(last, place)

    def _refuse(self, job: Job) -> None:
        row, settings, size = job.row, job.settings, self.block_size
        settings.refuse_speculative()
        refuse_for(self.facts, settings)
        if len(row.gaps) > 1 or row.given[-1]:
            raise UserError(
                f"{row.name} has text after a gap, which a model of layout '{self.facts.layout}' cannot see: leave it "
                "out, or take a model of layout 'bidirectional'"
            )
        if settings.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer: give BlockEngine its tokenizer, or leave stop out")
        if self.facts.mask_token_id in row.given[0]:
            raise UserError(
                f"{row.name} holds the mask token (id {self.facts.mask_token_id}), which stands for open "
                "positions: take it out"
            )
        num_given, (num_wanted,) = len(row.given[0]), row.gaps
        if self.shift == 1 and not num_given:
            raise UserError(f"{row.name} is empty: with shift 1 the first token cannot be predicted; give one token")
        room = self.capacity - num_given
        if num_given // size * size + size > self.capacity:
            raise UserError(
                f"{row.name} has {quantity(num_given, 'token')}; {self.capacity} fit, in blocks of {size}, and one "
                f"block must stay free: shorten it to {self.capacity - 1} tokens or fewer"
            )
        if num_wanted > room:
            raise UserError(
                f"{row.name} has {quantity(num_given, 'token')} and max_new_tokens={num_wanted}, but only "
                f"{self.capacity} fit, in blocks of {size}: write at most {room}, or shorten it"
            )


def _as_blocks(facts: ConversionFacts) -> tuple[Layout, int]:
    if facts.layout == "block":
        return facts.attention, facts.shift
    if facts.layout == "causal":
        return Layout("block", 1), facts.shift
    raise UserError(
        f"this model has layout '{facts.layout}': it is not decoded in blocks; use generate, which denoises whole rows"
    )


def _capacity(context: int | None, max_length: int | None, block_size: int) -> int:
    """Returns the positions that a row can have, in whole blocks."""
    if context is not None and max_length is not None and max_length > context:
        raise UserError(f"max_length={max_length} is over the model's context of {context} tokens; lower it")
    limits = [limit for limit in (context, max_length) if limit is not None]
    capacity = min(limits, default=sys.maxsize) // block_size * block_size
    if capacity == 0:
        raise UserError(f"a block of {block_size} tokens does not fit into {min(limits)}: give a larger max_length")
    return capacity
