"""The rows of one request, between the event loop and the thread that owns the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from decausal.sampling.jobs import Job, Progress
from decausal.serving.errors import ApiError

_log = logging.getLogger("decausal.serving")


class Update(NamedTuple):
    """What an answer's queue holds: a step of one of its rows, or the reason why no more will come."""

    index: int
    progress: Progress | None
    error: ApiError | None = None


class Places:
    """Places in a worker's queue, reserved before their rows are known.

    Args:
        number: How many.
        client: For whom.
        give_back: Called with the number of places that are free again, and the client.
    """

    def __init__(self, number: int, client: str, give_back: Callable[[int, str], None]) -> None:
        self._number, self.client, self._give_back = number, client, give_back

    def use(self, number: int) -> None:
        """Uses some of the places for rows and frees the others."""
        left, self._number = self._number - number, 0
        self._give_back(left, self.client)

    def release(self) -> None:
        """Frees the places that are not in use. May be called again."""
        self.use(0)


class Answer:
    """The rows of one request, as the event loop sees them.

    Attributes:
        jobs: All rows that were asked for.
        client: Who asked.
        rows: Rows that have not ended, for the worker's thread only.
        queue: Lists of `Update`, in order.
        admitted: Done once the engine has taken all rows. An exception says why it refused.
    """

    def __init__(self, jobs: Sequence[Job], client: str = "") -> None:
        self.jobs, self.client = list(jobs), client
        self.rows = [AnswerRow(self, index, job) for index, job in enumerate(jobs)]
        self.queue: asyncio.Queue[list[Update]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.admitted: asyncio.Future[None] = self.loop.create_future()

    def fail(self, error: ApiError) -> None:
        """Ends the answer from the event loop."""
        settle(self, error)
        self.queue.put_nowait([Update(0, None, error)])


@dataclass(eq=False)
class AnswerRow:
    """One row of an answer, in the engine or waiting for it.

    A row's result does not depend on the rows that share its passes, so a new engine repeats it. The results of its
    steps are kept for comparison, since the client may have read them. Rows that are denoised are repeated step by
    step. Where drafts are verified the tokens are repeated, and a pass may bring more of them or fewer.

    Attributes:
        answer: The answer; the row is its row number `index`.
        job: The row's job.
        ticket: The engine's ticket; None while the row waits.
        results: The results of its steps so far, or its tokens where drafts are verified.
        num_seen: As many of them the current engine has brought.
    """

    answer: Answer
    index: int
    job: Job
    ticket: int | None = None
    results: list[Any] = field(default_factory=list)
    num_seen: int = 0

    def news(self, progress: Progress) -> Progress | None:
        """Takes in a step; returns what of it was not reported yet.

        Raises:
            ApiError: The repeated part differs: two tokens were equally probable to the last bits.
        """
        if self.job.settings.speculative:
            return self._new_tokens(progress)
        brought = (progress.positions, progress.ids, progress.reopened, progress.row, progress.ended)
        self.num_seen += 1
        if self.num_seen > len(self.results):
            self.results.append(brought)
            return progress
        self._refuse_if(brought != self.results[self.num_seen - 1])
        return None

    def _new_tokens(self, progress: Progress) -> Progress | None:
        num_repeated = min(len(self.results) - self.num_seen, len(progress.ids))
        self._refuse_if(progress.ids[:num_repeated] != self.results[self.num_seen : self.num_seen + num_repeated])
        self.num_seen += len(progress.ids)
        self.results += progress.ids[num_repeated:]
        if num_repeated and num_repeated == len(progress.ids) and progress.ended is None:
            return None
        new = {name: getattr(progress, name)[num_repeated:] for name in ("positions", "ids", "confidence", "log_probs")}
        return replace(progress, **new)

    def _refuse_if(self, is_other: bool) -> None:
        if is_other:
            raise engine_failure("the engine failed, and this answer could not be continued where it was")


def engine_failure(message: str) -> ApiError:
    """Returns the error for rows that are lost with an engine."""
    return ApiError(500, message, code="engine_failed")


def call(answer: Answer, function: Callable[..., None], *arguments: Any) -> None:
    """Makes an answer's event loop call a function, from the worker's thread."""
    try:
        answer.loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the event loop has been closed
        _log.debug("an answer came after the server's end")


def settle(answer: Answer, error: ApiError | None) -> None:
    """Reports whether the engine has taken all rows; for the event loop."""
    if answer.admitted.done():  # the waiting request has gone
        return
    if error is None:
        answer.admitted.set_result(None)
    else:
        answer.admitted.set_exception(error)


def deliver(updates: list[tuple[Answer, list[Update]]]) -> None:
    """Passes on the results of a step; for the event loop."""
    for answer, items in updates:
        answer.queue.put_nowait(items)
