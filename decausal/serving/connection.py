"""Connections with deadlines for the client, which buffer little of what it sends."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from decausal.serving.errors import error_body

MAX_HEAD_BYTES = 2**16
"""Longest head of a request: its first line and its headers."""
HEAD_SECONDS = 20.0
"""How many seconds a head may take."""


class Connection(H11Protocol):
    """A connection of uvicorn, with deadlines for the client to send a head and to continue reading.

    h11 is used since it limits the length of heads. It also reads bodies that come with `Upgrade: h2c` (Java's
    default), which httptools loses.

    Attributes:
        head_seconds: Deadline for a head.
        read_seconds: Deadline for a client that stops reading.
    """

    head_seconds = HEAD_SECONDS
    read_seconds = HEAD_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting: asyncio.TimerHandle | None = None  # the timer for a head
        self._stalled: asyncio.TimerHandle | None = None  # the timer for a client that does not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for a first head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Reads. A head that has begun must be complete in time, however often more of it comes."""
        super().data_received(data)
        if self._is_answering:
            self._stop_waiting()
        elif self._waiting is None:
            self._expect_head()

    def on_response_complete(self) -> None:
        """Continues with what has arrived meanwhile. uvicorn's own timer closes idle connections."""
        super().on_response_complete()
        if self.conn.trailing_data[0] and not self._is_answering:
            self._expect_head()

    def pause_writing(self) -> None:
        """Called if the client does not read. It has some time to continue."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Called if it reads again."""
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def timeout_keep_alive_handler(self) -> None:
        """Closes the connection, even if the client has not read everything."""
        super().timeout_keep_alive_handler()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all timers."""
        super().connection_lost(exc)
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._stalled = _cancelled(self._stalled)

    def send_400_response(self, msg: str) -> None:
        """Answers, in OpenAI's form, that the request is not HTTP. A head that is too long has its own status."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        what = f"the head of the request is longer than {MAX_HEAD_BYTES} bytes" if status == 431 else "this is not HTTP"
        body = json.dumps(error_body(status, f"{what}: send a request that can be read", code="invalid_http")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        try:
            for event in (
                h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # inside a body whose request is being answered
            pass
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # a client that offers another protocol is answered in HTTP/1.1, without a warning

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._waiting = _cancelled(self._waiting)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def connection_class(timeout: float) -> type[Connection]:
    """Returns the class of connections for requests that may take so many seconds."""
    seconds = {"head_seconds": min(timeout, HEAD_SECONDS), "read_seconds": timeout}
    return type("Connection", (Connection,), seconds)
