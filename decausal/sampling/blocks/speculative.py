"""Self-speculative decoding: masks draft several tokens, the same weights verify them causally, one pass does both.

For each row, a pass reads the last known token and the previous pass's drafts for the next positions, under causal
attention. It also reads groups of masks, one after each number of drafts that may turn out right. The causal states
give the model's own token after the known token and after each draft. Drafts are right as long as they equal these
tokens, and the state after the last right one adds a token. The group after exactly these drafts has made the next
ones. `draft_shapes` says which groups there are.

The text is the causal model's own, whatever the drafts: its greedy text, or with temperature the text that it draws
with the same seed. Each position draws with its own number, a function of seed and position, so the verifier's token
depends on nothing else. A draft from the same number is most likely the same token.

Source: verifying drafts in one pass, Leviathan et al., Fast inference from transformers via speculative decoding (arXiv
2211.17192); one number for draft and verifier, Daliri et al., Coupling without communication and drafter-invariant
speculative decoding (arXiv 2408.07978), here with the inverse distribution function; masks as the drafter as in OPDLM
(arXiv 2606.06712).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from decausal.devices import choices
from decausal.errors import UserError
from decausal.models.block_cache import decoding, refuse_uncacheable
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.draft_choice import DraftChoice
from decausal.sampling.blocks.draft_shapes import autoregressive, linear, quadratic, strided
from decausal.sampling.blocks.draft_tables import Drafting, DraftTables
from decausal.sampling.blocks.drafting_row import DraftingRow, extent_of
from decausal.sampling.blocks.extent import Extent
from decausal.sampling.blocks.prefix_cache import PAGE, PrefixCache
from decausal.sampling.blocks.recording import PassRecorder
from decausal.sampling.blocks.speculative_rows import Places, Read, SpeculativeRows
from decausal.sampling.jobs import Job, Progress, TokenLogProbs
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.rows import Row
from decausal.sampling.scoring import job_log_probs
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import longest_draft, refuse_for

DRAFT_LENGTH = 4
"""Tokens drafted at once if the model has no blocks."""
_MOST_TABLES = 32
_SHAPES = {"quadratic": quadratic, "strided": strided, "linear": linear}


class SpeculativeEngine:
    """Continues prompts like the same weights under causal attention, with several tokens per pass.

    A step takes all rows whose prompts have been read one pass further. New rows read their prompts in separate passes,
    a limited number of tokens per step, without stopping the others. What a row becomes does not depend on them. These
    of its settings apply: temperature, `top_k`, `top_p`, `min_p`, `stop` and those of drafts. Schedules do not apply.

    Args:
        converted: Model, tokenizer (only for stop texts) and facts: shift, mask token and block size. Any layout except
            "causal", under which masks draft nothing.
        max_rows: Rows in one forward pass.
        max_length: Longest row. Memory for `max_rows` of them is taken by the first pass.
        prefix_cache_tokens: Tokens of beginnings that are held for rows which share them, see `prefix_cache`.
        record: What records repeated passes, see `BlockEngine`.

    Attributes:
        device: Where passes run.

    Raises:
        UserError: A causal layout, or a model that takes no such cache.
    """

    def __init__(
        self,
        converted: Converted,
        *,
        max_rows: int,
        max_length: int,
        prefix_cache_tokens: int = 0,
        record: PassRecorder | None = None,
    ) -> None:
        self._model, self._tokenizer, self._facts = converted
        SamplerSettings(speculative=True).refuse_layout(self._facts.layout)
        self._max_rows, self._max_length, self._reads_causally = max_rows, max_length, converted.facts.causal_groups
        with decoding(self._model):
            refuse_uncacheable(self._model)
        self.device = self._model.get_input_embeddings().weight.device
        self._most_read = choices(self.device).prompt_tokens
        self._rows: SpeculativeRows | None = None
        self._record = record
        self._num_prefix_tokens = prefix_cache_tokens
        self._prefixes: PrefixCache | None = None
        self._tables: dict[tuple[Drafting, ...], DraftTables] = {}
        self._held: list[DraftingRow] = []
        self._num_ready = 0
        self._waiting: deque[DraftingRow] = deque()
        self._gathered: tuple[tuple[int, ...], RowSettings] | None = None
        self._next_ticket = 0

    @property
    def num_running(self) -> int:
        """Rows that have a place, or get one in the next step."""
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
        refuse_for(self._facts, job.settings)
        self._refuse(job.row)
        self._next_ticket += 1
        longest = self._longest(job.settings)
        row = DraftingRow(self._next_ticket, job, autoregressive(), job.settings.verifier == "masks")
        if job.settings.draft != "auto":
            row.shape = _SHAPES[job.settings.draft](longest)
        elif longest:
            row.choice = DraftChoice.of(
                self._model,
                longest=longest,
                shift=self._facts.shift,
                reads_causally=self._reads_causally,
                by_masks=row.by_masks,
            )
        self._waiting.append(row)
        return self._next_ticket

    def cancel(self, ticket: int) -> None:
        """Drops a row, running or waiting."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        for row in [row for row in self._held if row.ticket == ticket]:
            self._drop(row)

    def step(self) -> list[Progress]:
        """Takes rows a pass further, and reads prompts of others in a second one; reports on all rows that took
        part."""
        with decoding(self._model):
            reported = self._write(self._held[: self._num_ready])
            self._admit()
            reported += self._read(self._to_read())
        return reported

    def _refuse(self, row: Row) -> None:
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

    def _longest(self, settings: SamplerSettings) -> int:
        """Returns the most tokens that are drafted at once."""
        length = longest_draft(self._facts) if settings.draft_length is None else settings.draft_length
        return DRAFT_LENGTH if length is None else length

    def _admit(self) -> None:
        """Gives free places to waiting rows."""
        new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_rows - len(self._held)))]
        for row in new:
            if row.choice is not None:
                row.shape = row.choice.shape(len(self._held) + len(new))
        if new:
            self._use_shapes([*self._held, *new])
        for row in new:
            row.place = len(self._held)
            self._held.append(row)
            self._rows.admit(row.prompt, row.job.seed, self._rows.tables.draftings.index(row.drafting))

    def _choose(self, rows: list[DraftingRow]) -> None:
        """Gives rows that leave the choice to the engine the fastest shape for this number of rows."""
        shapes = {choice: choice.shape(len(rows)) for choice in {row.choice for row in rows} if choice is not None}
        for row in rows:
            if row.choice is not None:
                row.change_shape(shapes[row.choice])
        if shapes:
            self._use_shapes(self._held)

    def _use_shapes(self, rows: list[DraftingRow]) -> None:
        """Tells the device what all rows draft."""
        draftings = tuple(dict.fromkeys(row.drafting for row in rows))
        if self._rows is not None and set(draftings) <= set(self._rows.tables.draftings):
            tables = self._rows.tables
        else:
            tables = self._tables_of(draftings)
        num_slots = self._max_length + 2 * tables.most_pending + 1 + tables.most_masks
        if self._rows is None:
            self._rows = SpeculativeRows(
                self._model,
                self._facts,
                tables=tables,
                max_rows=self._max_rows,
                num_slots=num_slots,
                record=self._record,
            )
            if self._num_prefix_tokens >= PAGE:
                self._prefixes = PrefixCache(self._rows.cache, self._num_prefix_tokens)
        self._rows.make_room(num_slots)
        self._rows.use(tables, [tables.draftings.index(row.drafting) for row in self._held])

    def _tables_of(self, draftings: tuple[Drafting, ...]) -> DraftTables:
        """Returns tables of some draftings. They are kept, because a choice that changes needs them repeatedly."""
        if draftings not in self._tables:
            if len(self._tables) == _MOST_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[draftings] = DraftTables(draftings, self._facts.shift, self._reads_causally, self.device)
        return self._tables[draftings]

    def _to_read(self) -> list[DraftingRow]:
        """Returns the rows whose prompts are read next, first come first, within the tokens that one pass may read."""
        found: list[DraftingRow] = []
        width, pages = 0, set()
        for row in sorted(self._held[self._num_ready :], key=lambda row: row.ticket):
            page = None if self._prefixes is None else self._prefixes.missing(row.prompt[:-1])
            if page is not None and page in pages:
                continue  # another row reads it now, and from the next pass on it is held
            pages.add(page)
            held = 0 if self._prefixes is None else self._prefixes.length(row.prompt[:-1])
            num_unread = min(row.num_unread, len(row.prompt) - held)
            width = max(width, min(num_unread, self._most_read))
            if found and width * (len(found) + 1) > self._most_read:
                break
            self._load_prefix(row)
            found.append(row)
        return found

    def _load_prefix(self, row: DraftingRow) -> None:
        """Copies the tokens that are held into a new row, which need not read them again."""
        if self._prefixes is None or row.num_cached:
            return
        row.num_cached = row.num_prefix_tokens = self._prefixes.load(row.prompt[:-1], row.place)
        self._rows.num_cached[row.place] = row.num_cached

    def _store_prefix(self, row: DraftingRow) -> None:
        if self._prefixes is not None:
            self._prefixes.store([*row.prompt, *row.ids][: row.num_cached], row.place)

    def _write(self, rows: list[DraftingRow]) -> list[Progress]:
        """Runs a pass over rows whose prompts have been read."""
        if not rows:
            return []
        self._choose(rows)
        choices_of_rows = {row.choice for row in rows if row.choice is not None}
        pending, start = [row.pending for row in rows], time.perf_counter()
        extent = extent_of(rows, 1, self._facts.shift)
        if self._record is not None:
            extent = self._rows.rounded(extent)
        brought, read = self._pass(rows, extent)
        seconds = time.perf_counter() - start
        for choice in choices_of_rows:
            outcomes = [
                (num_pending, len(tokens) - 1)
                for row, num_pending, tokens in zip(rows, pending, brought, strict=True)
                if row.choice is choice
            ]
            choice.note(len(rows), extent, seconds, outcomes)
        return self._report(rows, brought, read)

    def _read(self, rows: list[DraftingRow]) -> list[Progress]:
        """Runs a pass over rows whose prompts are being read. Rows that have read theirs join those that are ready."""
        if not rows:
            return []
        brought, read = self._pass(rows, extent_of(rows, self._most_read, self._facts.shift))
        for row, tokens in zip(rows, brought, strict=True):
            if tokens:
                self._make_ready(row)
            self._store_prefix(row)
        return self._report(rows, brought, read)

    def _pass(self, rows: list[DraftingRow], extent: Extent) -> tuple[list[list[int]], Read]:
        """Runs a pass. Returns what it brought each row, and how much it read."""
        read = self._rows.read(self._places(rows), extent, self._settings(rows))
        brought = [row[1 : 1 + row[0]] for row in read.outcome.tolist()]
        for row, tokens in zip(rows, brought, strict=True):
            row.note(tokens)
        return brought, read

    def _report(self, rows: list[DraftingRow], brought: list[list[int]], read: Read) -> list[Progress]:
        log_probs = self._log_probs(rows, brought, read)
        reported = [row.take(*each, self._tokenizer) for row, *each in zip(rows, brought, log_probs, strict=True)]
        for row, progress in zip(rows, reported, strict=True):
            if progress.ended is not None:
                self._store_prefix(row)
                self._drop(row)
        return reported

    def _places(self, rows: list[DraftingRow]) -> Places:
        places = [row.place for row in rows]
        if places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places))
        return torch.tensor(places).to(self.device)

    def _make_ready(self, row: DraftingRow) -> None:
        """Gives a row the place after the others that are ready."""
        other = self._held[self._num_ready]
        if other is not row:
            self._rows.swap(row.place, other.place)
            self._held[row.place], self._held[other.place] = other, row
            row.place, other.place = other.place, row.place
        self._num_ready += 1

    def _drop(self, row: DraftingRow) -> None:
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

    def _settings(self, rows: list[DraftingRow]) -> RowSettings:
        """Returns the rows' settings as tensors. They are rebuilt only if other rows are read."""
        tickets = tuple(row.ticket for row in rows)
        if self._gathered is None or self._gathered[0] != tickets:
            self._gathered = (tickets, RowSettings.of([row.job.settings for row in rows], self.device))
        return self._gathered[1]

    def _log_probs(
        self, rows: list[DraftingRow], brought: Sequence[Sequence[int]], read: Read
    ) -> list[list[TokenLogProbs]]:
        """Returns log-probabilities under causal attention."""
        return job_log_probs(
            [row.job for row in rows],
            brought,
            lambda place: read.states[place, : len(brought[place])],
            self._rows.head,
        )
