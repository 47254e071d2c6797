"""The thread that owns an engine: rows of many requests go in, what each step brings goes out."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from decausal.errors import UserError
from decausal.sampling.jobs import Engine, Job, Progress
from decausal.serving.errors import ApiError, bad_request
from decausal.serving.metrics import Metrics

Result = TypeVar("Result")

_log = logging.getLogger("decausal.serving")


class Told(NamedTuple):
    """What an answer's queue holds: a step of one of its rows, or why there will be no more."""

    index: int
    progress: Progress | None
    error: ApiError | None = None


class Answer:
    """The rows of one request, as the event loop sees them.

    Attributes:
        queue: Lists of `Told`, in order.
        admitted: Done once the engine has taken all rows; its exception is why it refused.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.queue: asyncio.Queue[list[Told]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.admitted: asyncio.Future[None] = self.loop.create_future()
        self.tickets: dict[int, int] = {}  # of rows that have not ended, to their index; the worker's thread alone

    def fail(self, error: ApiError) -> None:
        """Ends the answer from the event loop."""
        self.queue.put_nowait([Told(0, None, error)])


class Worker:
    """Runs one engine in one thread.

    Args:
        make_engine: Called once at the start, and again after a step that failed.
        name: Of the model, for metrics and log.
        max_rows: Rows that the engine runs together.
        max_queue: Rows that may wait beyond them.
        metrics: Counted in.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], *, name: str, max_rows: int, max_queue: int, metrics: Metrics
    ) -> None:
        self._make_engine, self._metrics, self._name = make_engine, metrics, name
        self._max_rows, self._max_queue = max_rows, max_queue
        self._engine = make_engine()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[int, Answer] = {}
        self._lock = threading.Lock()
        self._num_rows = 0
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
        """Ends the thread after the step it is in."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def submit(self, jobs: Sequence[Job]) -> Answer:
        """Takes a request on, from the event loop.

        Raises:
            ApiError: 400: more rows than can ever wait together. 429: they cannot now. 503: the thread has ended.
        """
        if len(jobs) > self._max_rows + self._max_queue:
            raise bad_request(
                f"{len(jobs)} answers at once are wanted (prompts times n), and this server takes at most "
                f"{self._max_rows + self._max_queue}: ask for fewer",
                "n",
                "too_many_choices",
            )
        if not self.is_alive:
            raise ApiError(503, "the engine has stopped: restart the server", code="engine_stopped")
        with self._lock:
            if self._num_rows + len(jobs) > self._max_rows + self._max_queue:
                wait = self._seconds_to_wait(len(jobs))
                raise ApiError(
                    429,
                    f"{self._num_rows} rows run or wait already, and this server takes {self._max_rows} and "
                    f"{self._max_queue}: try again in {wait} s",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                )
            self._num_rows += len(jobs)
        answer = Answer(jobs)
        self._inbox.put(lambda: self._admit(answer))
        return answer

    async def between_steps(self, function: Callable[[], Result]) -> Result:
        """Has the thread call a function between two steps; returns, or raises, what comes of it."""
        future: Future[Result] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(call)
        return await asyncio.wrap_future(future)

    def cancel(self, answer: Answer) -> None:
        """Gives up what has not ended, from any thread. May be called again, and after the end."""
        self._inbox.put(lambda: self._drop(answer))

    def _seconds_to_wait(self, num_rows: int) -> int:
        """How long until as many rows have left, at the rate of the last ones."""
        ended = self._ended_at
        if len(ended) < 2:
            return 1
        seconds_per_row = (time.monotonic() - ended[0]) / len(ended)
        return min(60, max(1, math.ceil(seconds_per_row * num_rows)))

    def _run(self) -> None:
        while self._take_messages():
            if self._answers:
                self._step()
            self._metrics.rows(self._name, self._engine.num_running, self._engine.num_waiting)
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None:
                message()
        self._fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))

    def _take_messages(self) -> bool:
        """Does what the inbox asks, and waits for it where there is nothing else to do. False: the thread ends."""
        while True:
            try:
                message = self._inbox.get(block=not self._answers)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
            if self._inbox.empty():
                return True

    def _admit(self, answer: Answer) -> None:
        for index, job in enumerate(answer.jobs):
            try:
                ticket = self._engine.submit(job)
            except Exception as error:  # one request's fault is no other's
                self._left(len(answer.jobs) - index)
                self._drop(answer)
                _call(answer, _settle, answer, _as_api_error(error))
                return
            answer.tickets[ticket] = index
            self._answers[ticket] = answer
        _call(answer, _settle, answer, None)

    def _drop(self, answer: Answer) -> None:
        self._left(len(answer.tickets))
        for ticket in answer.tickets:
            self._engine.cancel(ticket)
            del self._answers[ticket]
        answer.tickets.clear()

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            steps = self._engine.step()
        except Exception as error:  # what the rows were is lost with the engine; the server goes on
            _log.exception("a step of the engine failed")
            self._fail_all(_as_api_error(error))
            self._engine = self._make_engine()
            return
        told: dict[Answer, list[Told]] = {}
        for progress in steps:
            answer = self._answers.get(progress.ticket)
            if answer is None:
                continue
            told.setdefault(answer, []).append(Told(answer.tickets[progress.ticket], progress))
            if progress.ended is not None:
                self._ended_at.append(time.monotonic())
                self._left(1)
                del answer.tickets[progress.ticket], self._answers[progress.ticket]
        self._metrics.step(self._name, steps, time.perf_counter() - start)
        if told:  # once for all answers of a step
            _call(next(iter(told)), _deliver, list(told.items()))

    def _fail_all(self, error: ApiError) -> None:
        for answer in set(self._answers.values()):
            self._drop(answer)
            _call(answer, _deliver, [(answer, [Told(0, None, error)])])

    def _left(self, num_rows: int) -> None:
        with self._lock:
            self._num_rows -= num_rows


def _call(answer: Answer, function: Callable[..., None], *arguments: Any) -> None:
    """Has the event loop do something."""
    try:
        answer.loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop has been closed: nobody listens
        _log.debug("an answer came after the server's end")


def _settle(answer: Answer, error: ApiError | None) -> None:
    if answer.admitted.done():  # whoever waited has gone
        return
    if error is None:
        answer.admitted.set_result(None)
    else:
        answer.admitted.set_exception(error)


def _deliver(told: list[tuple[Answer, list[Told]]]) -> None:
    for answer, items in told:
        answer.queue.put_nowait(items)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, UserError):
        return bad_request(str(error))
    kind: Any = type(error).__name__
    return ApiError(
        500, f"the engine failed ({kind}); the server's log says more, and it goes on", code="engine_failed"
    )
