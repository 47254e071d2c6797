"""Checks around every request: its origin, the API key, errors in OpenAI's form, and counters."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decausal.errors import nearest
from decausal.serving.errors import ApiError, error_body
from decausal.serving.hosts import Hosts
from decausal.serving.metrics import Metrics

_log = logging.getLogger("decausal.serving")


def refused(error: ApiError) -> JSONResponse:
    """Returns an error as a response."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


class Gate:
    """Refuses other sites' pages, asks for the key, counts answers by status, and gives every error OpenAI's form."""

    def __init__(
        self, app: ASGIApp, hosts: Hosts, api_key: str | None, metrics: Metrics, endpoints: Iterable[str]
    ) -> None:
        self._app, self._hosts, self._metrics, self._endpoints = app, hosts, metrics, frozenset(endpoints)
        self._expected = None if api_key is None else _encoded(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # answered like GET; the server sends no body
            scope = {**scope, "method": "GET"}
        path = scope["path"]
        endpoint = path if path in self._endpoints else "other"
        is_started = False

        async def counting(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                self._metrics.request(endpoint, message["status"])
            await send(message)

        try:
            if error := self._refusal(path, scope):
                await refused(error)(scope, receive, counting)
            else:
                await self._app(scope, receive, counting)
        except ClientDisconnect:
            _log.debug("%s %s: the client has left", scope["method"], path)
        except Exception:
            _log.exception("%s %s failed", scope["method"], path)
            if not is_started:
                body = error_body(500, "the server failed on this request; its log says more", code="internal_error")
                await JSONResponse(body, 500)(scope, receive, counting)

    def _refusal(self, path: str, scope: Scope) -> ApiError | None:
        if path != "/health" and (error := self._hosts.refusal(scope["headers"])):  # probes may use any name
            return error
        if self._lacks_key(path, scope):
            message = "this server asks for its API key: send it as 'Authorization: Bearer KEY'"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None

    def _lacks_key(self, path: str, scope: Scope) -> bool:
        if self._expected is None or not path.startswith("/v1"):
            return False
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, given = header.partition(b" ")
        is_right = [hmac.compare_digest(given.strip(), expected) for expected in self._expected]
        return scheme.lower() != b"bearer" or not any(is_right)


def _encoded(key: str) -> list[bytes]:
    """Returns a key as clients write it into a header: most in UTF-8, some in Latin-1 where that is possible."""
    latin = [key.encode("latin-1")] if all(ord(character) < 256 for character in key) else []
    return [key.encode(), *latin]


def missing_page(request: Request, endpoints: Iterable[str]) -> ApiError:
    """Returns the error for an unknown path, with the nearest known one."""
    hint = nearest(request.url.path, endpoints)
    return ApiError(404, f"{request.url.path} is not there{hint}", code="not_found")


def wrong_method(request: Request, allowed: Any) -> ApiError:
    """Returns the error for a method that a path does not have."""
    headers = {"Allow": allowed} if allowed else {}
    message = f"{request.url.path} does not know {request.method}" + (f": use {allowed}" if allowed else "")
    return ApiError(405, message, code="method_not_allowed", headers=headers)
