"""One request, after it has been read and while it is being answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from decausal.serving.answer import Answer, Places
from decausal.serving.choices import Choice, Delta
from decausal.serving.plans import Plan
from decausal.serving.reading import client_left, left
from decausal.serving.served import Served


@dataclass(frozen=True)
class Asked:
    """A request that has been read."""

    model: Served
    plan: Plan
    places: Places
    choices: list[Choice]


@dataclass(frozen=True)
class Call:
    """One request while it is being answered. `timer` ends it at its deadline, whatever its connection does."""

    plan: Plan
    model: Served
    answer: Answer
    choices: list[Choice]
    echoes: list[Delta]
    header: dict[str, Any]
    endpoint: str
    arrived: float
    timer: asyncio.TimerHandle

    def end(self) -> None:
        """Drops rows that have not ended."""
        self.timer.cancel()
        self.model.worker.cancel(self.answer)


class Stream(StreamingResponse):
    """A stream that drops its rows if it ends early, even before its first event."""

    def __init__(self, call: Call, content: AsyncIterator[str], **options: Any) -> None:
        super().__init__(content, **options)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end()


async def give_up_when_left(request: Request, call: Call) -> None:
    """Ends an answer whose client has left."""
    await left(request)
    call.model.worker.give_up(call.answer, client_left())
