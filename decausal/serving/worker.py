"""The thread that owns an engine: rows of many requests go in, results of each step come out."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from decausal.errors import UserError
from decausal.sampling.jobs import Engine, Job, Progress
from decausal.serving.answer import Answer, AnswerRow, Places, Update, call, deliver, engine_failure, settle
from decausal.serving.errors import ApiError, bad_request
from decausal.serving.metrics import Metrics
from decausal.serving.settings import SHARE_OF_OTHERS
from decausal.serving.turns import Turns
from decausal.wording import quantity

Result = TypeVar("Result")

_log = logging.getLogger("decausal.serving")


class Worker:
    """Runs one engine in one thread.

    A step that fails only harms the row that made it fail. A new engine is made, and its rows are written again, half
    as many together, until the step succeeds or fails with a single row.

    Rows wait here, and clients take turns: the engine gets the next one when it has room. A small part of the queue is
    kept from each client for the others.

    Args:
        make_engine: Called once at the start, and again after each step that failed.
        name: The model's name, for metrics and log.
        max_rows: Rows that the engine runs together.
        max_queue: Rows that may wait beyond them.
        metrics: The counters.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], *, name: str, max_rows: int, max_queue: int, metrics: Metrics
    ) -> None:
        self._make_engine, self._metrics, self._name = make_engine, metrics, name
        self._max_rows, self._max_queue = max_rows, max_queue
        self._engine = make_engine()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._last_word = ApiError(503, "the server is shutting down", code="shutting_down")
        self._rows: dict[int, AnswerRow] = {}  # in the engine, by ticket
        self._turns = Turns()  # waiting for the engine
        self._held: deque[AnswerRow] = deque()  # waiting for it before all others, after a failure
        self._most: int | None = None  # rows that the engine may hold after a failure
        self._lock = threading.Lock()
        self._num_rows = 0
        self._rows_of: Counter[str] = Counter()  # by client
        self._ended_at: deque[float] = deque(maxlen=64)
        self._thread = threading.Thread(target=self._run, name=f"decausal-{name}", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive()

    @property
    def num_rows(self) -> int:
        """Rows that run or wait."""
        return self._num_rows

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def reserve(self, num_rows: int, client: str = "") -> Places:
        """Reserves places for a client's rows, from any thread, before anything is built from the request.

        Raises:
            ApiError: 400 if more rows are wanted than one client can ever have, 429 if it cannot have them now.
        """
        most = self._max_rows + self._max_queue
        most_of_client = most - self._max_queue // SHARE_OF_OTHERS
        if num_rows > most_of_client:
            raise bad_request(
                f"{quantity(num_rows, 'answer')} at once are wanted (prompts times n), and this server takes at most "
                f"{most_of_client}: ask for fewer",
                "n",
                "too_many_choices",
            )
        with self._lock:
            own = self._rows_of[client]
            if self._num_rows + num_rows > most or own + num_rows > most_of_client:
                wait = self._seconds_to_wait(num_rows)
                raise ApiError(
                    429,
                    f"{quantity(self._num_rows, 'row')} at work or waiting, {own} of this client; this server takes "
                    f"{self._max_rows} and {self._max_queue}, {most_of_client} of one client: try again in {wait} s",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                )
            self._num_rows += num_rows
            self._rows_of[client] += num_rows
        return Places(num_rows, client, self._left)

    def submit(self, jobs: Sequence[Job], places: Places) -> Answer:
        """Accepts a request, from the event loop.

        Args:
            jobs: Its rows.
            places: The places reserved for them. Those not needed are freed.

        Raises:
            ApiError: 503. The thread has ended.
        """
        if not self.is_alive:
            raise _stopped()
        places.use(len(jobs))
        answer = Answer(jobs, places.client)
        self._inbox.put(lambda: self._admit(answer))
        return answer

    async def between_steps(self, function: Callable[[], Result]) -> Result:
        """Lets the thread call a function between two steps, and returns or raises its result."""
        future: Future[Result] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(answer)
        return await asyncio.wrap_future(future)

    def cancel(self, answer: Answer) -> None:
        """Drops rows that have not ended, from any thread. May be called again, and after the end."""
        self._inbox.put(lambda: self._drop(answer))

    def give_up(self, answer: Answer, error: ApiError) -> None:
        """Ends an answer with an error, from the event loop, even if the client has left."""
        answer.fail(error)
        self.cancel(answer)

    def _seconds_to_wait(self, num_rows: int) -> int:
        """Returns how many seconds until as many rows have ended, at the rate of the last ones."""
        ended = self._ended_at
        if len(ended) < 2:
            return 1
        seconds_per_row = (time.monotonic() - ended[0]) / len(ended)
        return min(60, max(1, math.ceil(seconds_per_row * num_rows)))

    def _run(self) -> None:
        while self._take_messages():
            self._fill()
            if self._rows and not self._step():
                break
            num_waiting = self._engine.num_waiting + len(self._held) + len(self._turns)
            self._metrics.rows(self._name, self._engine.num_running, num_waiting)
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None:
                message()
        self._fail_all(self._last_word)

    def _take_messages(self) -> bool:
        """Handles the inbox, and waits for it if there is nothing else to do. Returns False if the thread has to
        end."""
        while True:
            try:
                message = self._inbox.get(block=not (self._rows or self._held or self._turns))
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
            if self._inbox.empty():
                return True

    def _admit(self, answer: Answer) -> None:
        for row in answer.rows:
            if not self._submit(row):
                return
            self._withdraw(row)  # it would be taken; when, its turn says
        self._turns.add(answer)
        call(answer, settle, answer, None)

    def _fill(self) -> None:
        """Moves waiting rows into the engine as far as it has room, after a failure only as many as it may hold."""
        while self._held or (self._turns and self._has_room()):
            if self._most is not None and len(self._rows) >= self._most:
                break
            self._submit(self._held.popleft() if self._held else self._turns.take())
        if not self._rows:
            self._most = None

    def _has_room(self) -> bool:
        """Returns whether a row would run in the next step. Of several kinds of rows, one may wait in the engine."""
        return self._engine.num_waiting == 0 or self._engine.num_running < self._max_rows

    def _submit(self, row: AnswerRow) -> bool:
        """Submits a row to the engine. If the engine refuses it, the answer ends."""
        try:
            row.ticket, row.num_seen = self._engine.submit(row.job), 0
        except Exception as error:  # other requests are not affected
            self._give_up(row.answer, _as_api_error(error))
            return False
        self._rows[row.ticket] = row
        return True

    def _withdraw(self, row: AnswerRow) -> None:
        if row.ticket is not None:
            self._engine.cancel(row.ticket)
            del self._rows[row.ticket]
            row.ticket = None

    def _drop(self, answer: Answer) -> None:
        self._left(len(answer.rows), answer.client)
        for row in answer.rows:
            self._withdraw(row)
        self._turns.drop(answer)
        self._held = deque(row for row in self._held if row.answer is not answer)
        answer.rows.clear()

    def _give_up(self, answer: Answer, error: ApiError) -> None:
        self._drop(answer)
        call(answer, settle, answer, error)
        call(answer, deliver, [(answer, [Update(0, None, error)])])

    def _step(self) -> bool:
        """Takes the engine's rows one step further. Returns False if there is no engine any more."""
        start, failure = time.perf_counter(), None
        try:
            steps = self._engine.step()
        except Exception as error:
            _log.exception("a step of the engine failed with %d rows in it", len(self._rows))
            failure = _as_api_error(error)
        if failure is not None:  # outside the handler, which keeps references to what the engine held
            return self._begin_anew(failure)
        updates: dict[Answer, list[Update]] = {}
        for progress in steps:
            if progress.ticket in self._rows:
                self._take(self._rows[progress.ticket], progress, updates)
        self._metrics.step(self._name, steps, time.perf_counter() - start)
        if updates:  # once for all answers of a step
            call(next(iter(updates)), deliver, list(updates.items()))
        return True

    def _take(self, row: AnswerRow, progress: Progress, updates: dict[Answer, list[Update]]) -> None:
        try:
            news = row.news(progress)
            if news is not None:
                updates.setdefault(row.answer, []).append(Update(row.index, news))
        except ApiError as error:
            updates.pop(row.answer, None)
            self._give_up(row.answer, error)
            return
        if progress.ended is not None:
            self._ended_at.append(time.monotonic())
            self._left(1, row.answer.client)
            row.answer.rows.remove(row)
            del self._rows[progress.ticket]

    def _begin_anew(self, error: ApiError) -> bool:
        """Recovers after a step that failed. The engine's state is lost, but not the jobs of its rows."""
        rows = list(self._rows.values())
        self._rows.clear()
        for row in rows:
            row.ticket = None
        if len(rows) == 1:
            self._give_up(rows[0].answer, error)
            self._most = None
        else:
            self._most = max(1, min(self._most or self._max_rows, len(rows)) // 2)
            self._held.extendleft(reversed(rows))
        del self._engine  # first, so that there is memory for another one
        try:
            self._engine = self._make_engine()
        except Exception:
            _log.exception("no new engine can be made: requests are refused from now on")
            self._last_word = _stopped()
            return False
        return True

    def _fail_all(self, error: ApiError) -> None:
        for answer in {row.answer for row in (*self._rows.values(), *self._held, *self._turns)}:
            self._give_up(answer, error)

    def _left(self, num_rows: int, client: str) -> None:
        with self._lock:
            self._num_rows -= num_rows
            self._rows_of[client] -= num_rows
            if not self._rows_of[client]:
                del self._rows_of[client]


def _stopped() -> ApiError:
    return ApiError(503, "the engine has stopped: restart the server", code="engine_stopped")


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, UserError):
        return bad_request(str(error))
    return engine_failure(f"the engine failed ({type(error).__name__}); the server's log says more, and it goes on")
