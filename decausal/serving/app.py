"""The HTTP application: its paths and their answers."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from decausal.sampling.scoring import given_log_probs
from decausal.serving import responses
from decausal.serving.call import Asked, Call, Stream, give_up_when_left
from decausal.serving.choices import Choice, Delta, TokenLogProb, echoed
from decausal.serving.counting import num_characters, num_rows
from decausal.serving.description import describe
from decausal.serving.errors import ApiError
from decausal.serving.hosts import Hosts
from decausal.serving.metrics import Metrics
from decausal.serving.middleware import Gate, missing_page, refused, wrong_method
from decausal.serving.parsing import parse
from decausal.serving.plans import Plan, chat_plan, completion_plan
from decausal.serving.reading import Readers, Work, client_left, read_body
from decausal.serving.schema import ChatBody, CompletionBody
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
    """Returns the application. Its lifespan starts and ends the models' threads.

    Args:
        models: The models. The first one answers requests that name none.
        settings: The API key and limits.
        metrics: The counters, which the models share.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in models:
            model.worker.start()
        yield
        service.readers.stop()
        for model in models:
            await asyncio.to_thread(model.worker.stop)

    service = _Service(models, settings, metrics)
    app = FastAPI(title="decausal", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
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
    hosts = Hosts(settings.host, settings.allowed_hosts)
    app.add_middleware(Gate, hosts=hosts, api_key=settings.api_key, metrics=metrics, endpoints=ENDPOINTS)
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


class _Service:
    """The endpoints."""

    def __init__(self, models: Sequence[Served], settings: ServeSettings, metrics: Metrics) -> None:
        self._models, self._settings, self._metrics = models, settings, metrics
        self.readers = Readers()

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
        work = Work(self._settings.timeout, self._late())
        try:
            call = await self._started(request, await self._asked(request, kind, make_plan, work), work, arrived)
        except BaseException as error:
            work.stop()
            if isinstance(error, ApiError) and error.code == "client_left":
                self._metrics.cancelled(request.url.path)
            raise
        if call.plan.is_stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return Stream(call, self._stream(call), media_type="text/event-stream", headers=headers)
        watcher = asyncio.create_task(give_up_when_left(request, call))
        try:
            return JSONResponse(await self._whole(call))
        finally:
            watcher.cancel()
            call.end()

    async def _asked(self, request: Request, kind: type, make_plan: Callable[..., Plan], work: Work) -> Asked:
        """Reads the body and makes a plan from it, in threads, so that a long body does not block other requests."""

        def read(body: CompletionBody | ChatBody) -> Asked:
            model = find(self._models, body.model)
            places = model.worker.reserve(num_rows(body), request.client.host if request.client else "")
            work.hold(places)
            plan = make_plan(body, model.converted, model.max_total_tokens, work)
            tokenizer = model.converted.tokenizer
            choices = [
                Choice(index, job, tokenizer, plan.has_events, len(plan.echoes[index]))
                for index, job in enumerate(plan.jobs)
            ]
            return Asked(model, plan, places, choices)

        async with AsyncExitStack() as stack:

            async def wait_for_room() -> None:
                await stack.enter_async_context(self.readers.room(work))

            raw = await read_body(request, self._settings.max_body_bytes, self._settings.timeout, wait_for_room)
            body = await self.readers.call(partial(parse, raw, kind), len(raw), work, request)
            return await self.readers.call(partial(read, body), num_characters(body), work, request)

    async def _started(self, request: Request, asked: Asked, work: Work, arrived: float) -> Call:
        """Queues the rows of a request, and returns once the engine has taken them."""
        plan, model = asked.plan, asked.model
        answer = model.worker.submit([] if plan.is_echo_only else plan.jobs, asked.places)
        timer = answer.loop.call_later(work.seconds_left, model.worker.give_up, answer, self._late())
        try:
            async with asyncio.timeout(work.seconds_left):
                await asyncio.shield(answer.admitted)
                echoes = await _echoes(plan, model, request)
        except BaseException as error:
            timer.cancel()
            model.worker.cancel(answer)
            if isinstance(error, TimeoutError):
                raise self._late() from None
            raise
        self._metrics.taken(model.name, plan.num_prompt_tokens)
        prefix = "cmpl" if plan.kind == "text" else "chatcmpl"
        header = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
        return Call(plan, model, answer, asked.choices, echoes, header, request.url.path, arrived, timer)

    async def _whole(self, call: Call) -> dict[str, Any]:
        deltas = [[echo] for echo in call.echoes]
        async for choice, delta in self._deltas(call):
            deltas[choice.index].append(delta)
        return responses.whole(call.plan, call.header, call.choices, deltas)

    async def _stream(self, call: Call) -> AsyncIterator[str]:
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
        except ApiError as error:  # the status has been sent: the stream itself must report the error
            yield responses.sse(error.body())
        except Exception:
            _log.exception("a stream of %s failed", call.endpoint)
            error = ApiError(500, "the server failed on this request; its log says more", code="internal_error")
            yield responses.sse(error.body())
        yield responses.DONE

    async def _deltas(self, call: Call) -> AsyncIterator[tuple[Choice, Delta]]:
        """Follows the rows of a call to their end. Drops the remaining rows if it is interrupted."""
        num_open, has_text = len(call.answer.jobs), False
        try:
            while num_open:
                for update in await call.answer.queue.get():
                    if update.progress is None:
                        raise update.error or ApiError(500, "the answer was lost")
                    choice = call.choices[update.index]
                    delta = choice.take(update.progress)
                    num_open -= choice.ended is not None
                    if delta.text and not has_text:
                        has_text = True
                        self._metrics.first_text(call.endpoint, time.monotonic() - call.arrived)
                    yield choice, delta
            self._metrics.answered(call.endpoint, time.monotonic() - call.arrived)
        finally:
            call.end()
            if num_open:
                self._metrics.cancelled(call.endpoint)

    def _late(self) -> ApiError:
        seconds = f"{self._settings.timeout:g} s"
        return ApiError(504, f"the answer took longer than {seconds}: ask for less, or later", code="timeout")


async def _echoes(plan: Plan, model: Served, request: Request) -> list[Delta]:
    """Returns what each choice repeats of its prompt. Prompts are scored one by one, so that other requests' steps
    continue."""
    reason, tokenizer = ("length" if plan.is_echo_only else None), model.converted.tokenizer
    if not plan.scored:
        return [Delta(echo, finish_reason=reason) for echo in plan.echoes]
    repeated: list[list[TokenLogProb]] = []
    for index, (ids, num_before) in enumerate(plan.scored):
        if index and plan.scored[index - 1][0] is ids:  # another choice for the same prompt
            repeated.append(repeated[-1])
            continue
        if await request.is_disconnected():
            raise client_left()
        score = partial(given_log_probs, model.converted, ids, plan.num_top_log_probs or 0)
        repeated.append(echoed(tokenizer, ids, num_before, await model.worker.between_steps(score)))
    return [Delta(echo, tokens, reason) for echo, tokens in zip(plan.echoes, repeated, strict=True)]
