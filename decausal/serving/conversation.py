"""A conversation with a converted model: its messages, and answers that arrive as they become final."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from decausal.data.template import render
from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.batch import longest_row
from decausal.sampling.engines import engine_for
from decausal.sampling.jobs import Drafts, Job
from decausal.sampling.rows import Row
from decausal.sampling.settings.of_model import refuse_for, settings_for
from decausal.sampling.stopping import end_token_ids
from decausal.sampling.texts import text_ids
from decausal.serving.choices import Choice

Message = dict[str, str]


class Conversation:
    """Messages, sampler settings and one row of an engine.

    Attributes:
        messages: All messages except the system's.
        system: The system's message, or None.
        settings: Settings of the next answer. Each answer draws from `settings.seed`, so a turn can be repeated.
        drafts: Figures of the last answer's drafts, if it was speculated.
        num_left_out: Messages that the last answer did not see, because the model's context was full.

    Args:
        converted: Model, tokenizer with a chat template, facts.
        system: The system's message.
        max_length: Longest row; None: the model's context, at most 4096.
        **options: `SamplerSettings` by name.

    Raises:
        UserError: There is no chat template, or a setting is wrong or not for this layout.
    """

    def __init__(
        self, converted: Converted, *, system: str | None = None, max_length: int | None = None, **options: Any
    ) -> None:
        if not converted.tokenizer.chat_template:
            raise UserError(
                "chat needs a chat template, and this model's tokenizer has none: continue texts with `decausal "
                "generate DIR`, or convert a model that was trained to chat"
            )
        self.system, self.messages, self.num_left_out = system, list[Message](), 0
        self.drafts: Drafts | None = None
        self._converted, self._is_stopped = converted, False
        self.settings = settings_for(converted.facts)
        self.set(**options)
        self._longest = longest_row(converted, max_length)
        self._engine = engine_for(converted, max_rows=1, max_length=self._longest, prefix_cache_tokens=self._longest)
        self._ends = end_token_ids(converted)

    def set(self, **options: Any) -> None:
        """Changes sampler settings by name, or by the names other samplers use.

        Raises:
            UserError: A wrong name or value, or one that this model's layout does not support. Nothing is changed.
        """
        settings = self.settings.updated(**options)
        refuse_for(self._converted.facts, settings)
        self.settings = settings

    def ask(self, text: str) -> Iterator[str]:
        """Sends a message and yields the answer piece by piece, as its text becomes final.

        The oldest turns are left out if the context is full. If an answer is stopped or its iterator is closed, the
        part so far is kept, and the row is free again.

        Raises:
            UserError: The message does not fit, holds the mask token, or the template refuses it. It is dropped.
        """
        self.messages.append({"role": "user", "content": text.encode(errors="replace").decode()})
        try:
            job = self._job()
            ticket = self._engine.submit(job)
        except UserError:
            self.messages.pop()
            raise
        self.drafts = None
        choice, self._is_stopped = Choice(0, job, self._converted.tokenizer), False
        try:
            while choice.ended is None and not self._is_stopped:
                for progress in self._engine.step():
                    if piece := choice.take(progress).text:
                        yield piece
        finally:
            if choice.ended is None:
                self._engine.cancel(ticket)
            else:
                self.drafts = choice.ended.drafts
            if choice.ended is None and not choice.text:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": choice.text})

    def stop(self) -> None:
        """Ends the current answer after its next step. Safe to call from a signal handler."""
        self._is_stopped = True

    def undo(self) -> bool:
        """Removes the last question and its answer. Returns False if there is none."""
        had_any = bool(self.messages)
        del self.messages[-2:]
        return had_any

    def clear(self) -> None:
        """Removes all turns. Settings and the system's message stay."""
        self.messages.clear()

    def _job(self) -> Job:
        """Returns the row for the answer to the last message, with as many earlier turns as leave room for a whole
        answer."""
        wanted = self.settings.max_new_tokens
        for start in range(0, len(self.messages), 2):
            ids = self._ids(self.messages[start:])
            if len(ids) + wanted <= self._longest:
                break
        room = self._longest - len(ids)
        if room < 1:
            raise UserError(
                f"the message makes a prompt of {len(ids)} tokens, and a row of this model has {self._longest}: "
                "shorten it"
            )
        self.num_left_out = start
        row = Row((ids, []), (min(wanted, room),), "the conversation")
        row.check(self._converted)
        return Job(row, self.settings, self.settings.seed, self._ends)

    def _ids(self, messages: list[Message]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        tokenizer = self._converted.tokenizer
        text = render([*system, *messages], tokenizer, "the conversation", add_generation_prompt=True)
        return text_ids(tokenizer, text)
