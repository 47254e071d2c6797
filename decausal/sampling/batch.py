"""Any number of prompts through one engine: answers in the order of the prompts, in bounded memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.defaults import settings_for
from decausal.sampling.engines import engine_for
from decausal.sampling.generate import Generation, continuation, continuing
from decausal.sampling.jobs import BATCH_SIZE, Job
from decausal.sampling.settings import MOST_ROWS, SamplerSettings
from decausal.sampling.stopping import end_token_ids

LONGEST = 4096
"""Tokens of a row where neither the model nor the caller says how many."""
WINDOW = 64
"""Rows begun at once, as a multiple of those in one pass: how far others may run ahead of a slow one."""


@dataclass(frozen=True)
class Wanted:
    """A prompt of a batch.

    Attributes:
        text: The prompt.
        settings: How it is continued; its `seed` is the row's own.
        chat: Put it through the tokenizer's chat template.
        name: What error messages call it.
    """

    text: str
    settings: SamplerSettings
    chat: bool = False
    name: str = "the prompt"


class BatchEngine:
    """Continues prompts `max_rows` at a time; as one row ends the next one enters.

    What becomes of a prompt is what `generate` makes of it with the same seed and settings.

    Example:
        >>> engine = model.engine(max_rows=64)
        >>> for answer in engine.run(prompts, max_new_tokens=64):
        ...     print(answer.text)

    Args:
        converted: Model, tokenizer and facts. The facts' sampler settings are the defaults.
        max_rows: Rows in one forward pass.
        max_length: Longest row, prompt and answer together. None: the model's context, at most 4096. A block model
            takes memory for `max_rows` of them at once.
        cuda_graphs: See `engine_for`.

    Raises:
        UserError: No row fits, or rows longer than the model's context are wanted.
    """

    def __init__(
        self,
        converted: Converted,
        *,
        max_rows: int = BATCH_SIZE,
        max_length: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        if not 1 <= max_rows <= MOST_ROWS:
            raise UserError(f"max_rows={max_rows} is not accepted: it must be from 1 to {MOST_ROWS}")
        self.converted, self.max_rows = converted, max_rows
        self.defaults = settings_for(converted.facts)
        self._ends = end_token_ids(converted)
        self._engine = engine_for(
            converted, max_rows=max_rows, max_length=longest_row(converted, max_length), cuda_graphs=cuda_graphs
        )

    def run(self, prompts: Iterable[str], *, chat: bool = False, **options: Any) -> Iterator[Generation]:
        """Continues prompts and yields the answers in their order; prompts are taken as places become free.

        Args:
            prompts: Text; row i draws from `seed` + i. One at a time runs on one engine: finish or close the iterator
                before the next one.
            chat: See `generate`.
            **options: `SamplerSettings` by name.

        Raises:
            UserError: As `generate`, once that prompt is reached.
        """
        settings = self.defaults.updated(**options)
        wanted = (
            Wanted(text, settings.updated(seed=settings.seed + index), chat, f"prompt {index + 1}")
            for index, text in enumerate(prompts)
        )
        with closing(self.answers(wanted)) as answers:
            for answer in answers:
                if isinstance(answer, UserError):
                    raise answer
                yield answer

    def answers(self, wanted: Iterable[Wanted | UserError]) -> Generator[Generation | UserError, None, None]:
        """As `run`, with settings for each prompt; one that is refused yields its error in its place.

        Errors among `wanted` are passed on in their places.
        """
        source, is_exhausted = iter(wanted), False
        running: dict[int, tuple[int, Wanted, Job]] = {}
        finished: dict[int, Generation | UserError] = {}
        num_taken = num_told = 0
        try:
            while running or not is_exhausted:
                while not is_exhausted and self._has_room(num_taken - num_told):
                    try:
                        each = next(source)
                    except StopIteration:
                        is_exhausted = True
                        break
                    self._begin(each, num_taken, running, finished)
                    num_taken += 1
                for progress in self._engine.step() if running else ():
                    if progress.ended is not None:
                        index, prompt, job = running.pop(progress.ticket)
                        finished[index] = continuation(self.converted, prompt.text, job, progress.ended)
                while num_told in finished:
                    answer = finished.pop(num_told)
                    num_told += 1
                    yield answer
        finally:
            for ticket in running:
                self._engine.cancel(ticket)

    def _has_room(self, num_unfinished: int) -> bool:
        """Enough rows wait that no place stays empty for a pass, but not more."""
        return self._engine.num_waiting < self.max_rows and num_unfinished < WINDOW * self.max_rows

    def _begin(
        self,
        wanted: Wanted | UserError,
        index: int,
        running: dict[int, tuple[int, Wanted, Job]],
        finished: dict[int, Generation | UserError],
    ) -> None:
        if isinstance(wanted, UserError):
            finished[index] = wanted
            return
        try:
            job = self._job(wanted)
            running[self._engine.submit(job)] = (index, wanted, job)
        except UserError as error:
            finished[index] = error

    def _job(self, wanted: Wanted) -> Job:
        return continuing(self.converted, wanted.text, wanted.settings, self._ends, chat=wanted.chat, name=wanted.name)


def longest_row(converted: Converted, max_length: int | None) -> int:
    """Tokens of the longest row that an engine of this model takes, in whole blocks where it has blocks.

    Raises:
        UserError: `max_length` is over the model's context, or leaves no room for a block.
    """
    context, block_size = context_length(converted.model.config), converted.facts.block_size or 1
    if max_length is not None and context is not None and max_length > context:
        raise UserError(f"max_length={max_length} is over the model's context of {context} tokens; lower it")
    longest = min(context or LONGEST, LONGEST) if max_length is None else max_length
    longest -= longest % block_size
    if longest < 2:
        raise UserError(f"max_length={max_length} leaves no room for a prompt and {block_size} tokens behind it")
    return longest
