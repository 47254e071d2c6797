"""Reads bodies off the event loop, in bounded memory, and only while the client waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import Request

from decausal.serving.answer import Places
from decausal.serving.errors import ApiError
from decausal.serving.settings import LARGE

Result = TypeVar("Result")

MAX_LARGE_BODIES = 8
"""The most large bodies in memory at a time. Others wait with no more than a connection's buffer read."""
NUM_SMALL_READERS = 4
DRAIN_FACTOR = 16
"""A body that is too long is read up to this many times the limit, so that the client is ready for the answer."""
BODY_SECONDS = 60.0
"""How many seconds a body may take to arrive."""


class Work:
    """The work for a request before its rows are queued. It ends at its deadline, or when the client has left.

    Args:
        seconds: Seconds until the deadline.
        late: The error after the deadline.
    """

    def __init__(self, seconds: float, late: ApiError) -> None:
        self.deadline, self.late = time.monotonic() + seconds, late
        self._lock = threading.Lock()
        self._is_stopped = False
        self._places: Places | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Called between pieces of work.

        Raises:
            ApiError: The work has to end.
        """
        if self._is_stopped or not self.seconds_left:
            raise self.late

    def hold(self, places: Places) -> None:
        """Reserves places in the queue while the work goes on.

        Raises:
            ApiError: The work has to end.
        """
        with self._lock:
            self._places = places
            if self._is_stopped:
                places.release()
                raise self.late

    def stop(self) -> None:
        """Gives the work up: its places are free, and its thread ends at the next `check`."""
        with self._lock:
            self._is_stopped = True
            if self._places is not None:
                self._places.release()


class Readers:
    """Threads that read bodies. Small bodies, which are the most, never wait for large ones, which are read one by
    one."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(NUM_SMALL_READERS, "decausal-read")
        self._large = ThreadPoolExecutor(1, "decausal-read-large")
        self._large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)

    async def call(self, function: Callable[[], Result], size: int, work: Work, request: Request) -> Result:
        """Lets a thread call a function, and returns or raises its result.

        Raises:
            ApiError: 504 or 499. The time is over, or the client has left.
        """
        pool = self._large if size > LARGE else self._small
        reading = asyncio.wrap_future(pool.submit(function))
        leaving = asyncio.create_task(left(request))
        try:
            first: set[asyncio.Future[object]] = {reading, leaving}
            await asyncio.wait(first, timeout=work.seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise client_left() if leaving.done() else work.late
        finally:
            leaving.cancel()
            reading.cancel()

    @asynccontextmanager
    async def room(self, work: Work) -> AsyncIterator[None]:
        """Takes one of the places for large bodies.

        Raises:
            ApiError: 504. No place became free in time.
        """
        try:
            async with asyncio.timeout(work.seconds_left):
                await self._large_bodies.acquire()
        except TimeoutError:
            raise work.late from None
        try:
            yield
        finally:
            self._large_bodies.release()

    def stop(self) -> None:
        """Accepts no more work."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)


async def left(request: Request) -> None:
    """Returns once the client has left. Its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def client_left() -> ApiError:
    """Returns the error for a client that has left; it is never read."""
    return ApiError(499, "the client has left", code="client_left")


async def read_body(request: Request, max_bytes: int, seconds: float, on_large: Callable[[], Awaitable[None]]) -> bytes:
    """Reads a JSON body.

    Args:
        request: A request of which nothing has been read.
        max_bytes: Longest body.
        seconds: How many seconds it may take.
        on_large: Awaited before more than `LARGE` bytes are read.

    Raises:
        ApiError: 408 if it does not arrive, 413 if it is too long, 415 if it is declared as something else.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # The header is also required because browsers then refuse to send it for another site's page.
        raise ApiError(
            415, "send JSON, with the header 'Content-Type: application/json'", code="unsupported_media_type"
        )
    try:
        async with asyncio.timeout(min(seconds, BODY_SECONDS)):
            return await _whole_body(request, max_bytes, on_large)
    except TimeoutError:
        message = f"the body did not arrive within {min(seconds, BODY_SECONDS):.3g} s: send it at once"
        raise ApiError(408, message, code="body_too_slow", headers={"Connection": "close"}) from None


async def _whole_body(request: Request, max_bytes: int, on_large: Callable[[], Awaitable[None]]) -> bytes:
    chunks: list[bytes] = []
    length, is_large = 0, False
    async for chunk in request.stream():
        length += len(chunk)
        if length > LARGE and not is_large:
            is_large = True
            await on_large()
        if length <= max_bytes:
            chunks.append(chunk)
        else:
            chunks.clear()
        if length > DRAIN_FACTOR * max_bytes:
            break
    if length > max_bytes:
        raise ApiError(413, f"the body is longer than {max_bytes} bytes: send less", code="body_too_long")
    return b"".join(chunks)
