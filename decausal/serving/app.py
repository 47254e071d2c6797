"""The HTTP application: paths, and what each answers."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from decausal.sampling.log_probs import given_log_probs
from decausal.serving import responses
from decausal.serving.answer import Answer
from decausal.serving.choices import Choice, Delta, TokenLogProb, echoed
from decausal.serving.description import describe
from decausal.serving.errors import ApiError
from decausal.serving.metrics import Metrics
from decausal.serving.middleware import Gate, missing_page, read_body, refused, wrong_method
from decausal.serving.plans import Plan, chat_plan, completion_plan
from decausal.serving.schema import ChatBody, CompletionBody, parse
from decausal.serving.served import Served, find
from decausal.serving.settings import ServeSettings

_log = logging.getLogger("decausal.serving")

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")
PAGE_FILES = {
    "/": ("playground.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
    "/playground-view.js": ("playground-view.js", "text/javascript"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def create_app(models: Sequence[Served], settings: ServeSettings, metrics: Metrics) -> FastAPI:
    """Returns the application; its lifespan starts and ends the models' threads.

    Args:
        models: The first answers where a request names none.
        settings: Key and limits.
        metrics: What the models count in too.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in models:
            model.worker.start()
        yield
        for model in models:
            await asyncio.to_thread(model.worker.stop)

    app = FastAPI(title="decausal", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    service = _Service(models, settings, metrics)
    app.add_api_route("/v1/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat_completions, methods=["POST"])
    app.add_api_route("/v1/models", service.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.show_model, methods=["GET"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics_page, methods=["GET"])
    for path, (name, media_type) in PAGE_FILES.items():
        app.add_api_route(path, _page(name, media_type), methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ApiError, _tell_api_error)
    app.add_exception_handler(HTTPException, _tell_http_error)
    app.add_middleware(Gate, api_key=settings.api_key, metrics=metrics, endpoints=ENDPOINTS)
    describe(app, has_key=settings.api_key is not None)
    return app


def _page(name: str, media_type: str) -> Callable[[], Any]:
    content = (files("decausal.serving") / "playground" / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page


async def _tell_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return refused(error)


async def _tell_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return refused(missing_page(request, ENDPOINTS))
    if error.status_code == 405:
        return refused(wrong_method(request, (error.headers or {}).get("Allow")))
    return refused(ApiError(error.status_code, str(error.detail)))


@dataclass(frozen=True)
class _Call:
    """One request while it is being answered."""

    plan: Plan
    model: Served
    answer: Answer
    choices: list[Choice]
    echoes: list[Delta]
    header: dict[str, Any]
    endpoint: str
    arrived: float


class _Stream(StreamingResponse):
    """A stream whose rows are given up when it ends early, even before its first event."""

    def __init__(self, call: _Call, content: AsyncIterator[str], **options: Any) -> None:
        super().__init__(content, **options)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.model.worker.cancel(self._call.answer)


class _Service:
    """The endpoints."""

    def __init__(self, models: Sequence[Served], settings: ServeSettings, metrics: Metrics) -> None:
        self._models, self._settings, self._metrics = models, settings, metrics

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody, completion_plan)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatBody, chat_plan)

    async def list_models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model.card() for model in self._models]})

    async def show_model(self, name: str) -> JSONResponse:
        return JSONResponse(find(self._models, name).card())

    async def health(self) -> JSONResponse:
        stopped = [model.name for model in self._models if not model.worker.is_alive]
        if stopped:
            raise ApiError(503, f"the engine of {', '.join(stopped)} has stopped", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    async def metrics_page(self) -> PlainTextResponse:
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, kind: type, make_plan: Callable[..., Plan]) -> Response:
        arrived = time.monotonic()
        raw = await read_body(request, self._settings.max_body_bytes)
        call = await self._started(request, raw, kind, make_plan, arrived)
        if call.plan.is_stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return _Stream(call, self._stream(call), media_type="text/event-stream", headers=headers)
        watcher = asyncio.create_task(_leave(request, call.answer))
        try:
            return JSONResponse(await self._whole(call))
        finally:
            watcher.cancel()

    async def _started(
        self, request: Request, raw: bytes, kind: type, make_plan: Callable[..., Plan], arrived: float
    ) -> _Call:
        """Reads the body in a thread, so that a long prompt's tokens keep nobody waiting; then queues its rows."""

        def read() -> tuple[Served, Plan]:
            body = parse(raw, kind)
            model = find(self._models, body.model)
            return model, make_plan(body, model.converted, model.max_total_tokens)

        model, plan = await asyncio.to_thread(read)
        answer = model.worker.submit([] if plan.is_echo_only else plan.jobs)
        try:
            async with asyncio.timeout(self._settings.timeout):
                await asyncio.shield(answer.admitted)
                echoes = await _echoes(plan, model)
        except TimeoutError:
            model.worker.cancel(answer)
            raise self._late() from None
        except BaseException:
            model.worker.cancel(answer)
            raise
        self._metrics.taken(model.name, plan.num_prompt_tokens)
        tokenizer = model.converted.tokenizer
        choices = [
            Choice(index, job, tokenizer, plan.has_events, len(plan.echoes[index]))
            for index, job in enumerate(plan.jobs)
        ]
        prefix = "cmpl" if plan.kind == "text" else "chatcmpl"
        header = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
        return _Call(plan, model, answer, choices, echoes, header, request.url.path, arrived)

    async def _whole(self, call: _Call) -> dict[str, Any]:
        deltas = [[echo] for echo in call.echoes]
        async for choice, delta in self._deltas(call):
            deltas[choice.index].append(delta)
        return responses.whole(call.plan, call.header, call.choices, deltas)

    async def _stream(self, call: _Call) -> AsyncIterator[str]:
        is_first = [True] * len(call.choices)
        try:
            for choice, echo in zip(call.choices, call.echoes, strict=True):
                if echo.text or echo.finish_reason:
                    yield responses.sse(responses.chunk(call.plan, call.header, choice, echo) or {})
            async for choice, delta in self._deltas(call):
                found = responses.chunk(call.plan, call.header, choice, delta, is_first[choice.index])
                if found is not None:
                    is_first[choice.index] = False
                    yield responses.sse(found)
            if call.plan.has_usage:
                yield responses.sse(responses.usage_chunk(call.plan, call.header, call.choices))
        except ApiError as error:  # the status has gone out: the stream itself must tell
            yield responses.sse(error.body())
        except Exception:
            _log.exception("a stream of %s failed", call.endpoint)
            error = ApiError(500, "the server failed on this request; its log says more", code="internal_error")
            yield responses.sse(error.body())
        yield responses.DONE

    async def _deltas(self, call: _Call) -> AsyncIterator[tuple[Choice, Delta]]:
        """Follows the rows of a call to their end; gives up those that are left where it is not reached."""
        deadline = call.answer.loop.time() + self._settings.timeout - (time.monotonic() - call.arrived)
        timer = call.answer.loop.call_at(deadline, call.answer.fail, self._late())
        num_open, has_text = len(call.answer.jobs), False
        try:
            while num_open:
                for told in await call.answer.queue.get():
                    if told.progress is None:
                        raise told.error or ApiError(500, "the answer was lost")
                    choice = call.choices[told.index]
                    delta = choice.take(told.progress)
                    num_open -= choice.ended is not None
                    if delta.text and not has_text:
                        has_text = True
                        self._metrics.first_text(call.endpoint, time.monotonic() - call.arrived)
                    yield choice, delta
            self._metrics.answered(call.endpoint, time.monotonic() - call.arrived)
        finally:
            timer.cancel()
            if num_open:
                call.model.worker.cancel(call.answer)
                self._metrics.cancelled(call.endpoint)

    def _late(self) -> ApiError:
        seconds = f"{self._settings.timeout:g} s"
        return ApiError(504, f"the answer took longer than {seconds}: ask for less, or later", code="timeout")


async def _echoes(plan: Plan, model: Served) -> list[Delta]:
    """What each choice repeats of its prompt. Prompts are scored one at a time, so that others' steps go on."""
    reason, tokenizer = ("length" if plan.is_echo_only else None), model.converted.tokenizer
    if not plan.scored:
        return [Delta(echo, finish_reason=reason) for echo in plan.echoes]
    told: list[list[TokenLogProb]] = []
    for index, (ids, num_before) in enumerate(plan.scored):
        if index and plan.scored[index - 1][0] is ids:  # another choice for the same prompt
            told.append(told[-1])
            continue
        score = partial(given_log_probs, model.converted, ids, plan.num_top_log_probs or 0)
        told.append(echoed(tokenizer, ids, num_before, await model.worker.between_steps(score)))
    return [Delta(echo, tokens, reason) for echo, tokens in zip(plan.echoes, told, strict=True)]


async def _leave(request: Request, answer: Answer) -> None:
    """Ends an answer whose client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.fail(ApiError(499, "the client has left", code="client_left"))
