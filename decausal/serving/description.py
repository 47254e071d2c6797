"""The OpenAPI description: bodies as they are checked, and every status of an endpoint."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from decausal.sampling.settings import ALIASES
from decausal.serving.parsing import IGNORED, NEUTRAL
from decausal.serving.schema import ChatBody, CompletionBody

BODIES = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
ERRORS = {
    400: "something that is not accepted; `param` names the field",
    401: "no API key, or a wrong one",
    404: "no such model or path",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "the queue is full; `Retry-After` says how long to wait",
    500: "the server's fault",
    503: "the engine has stopped",
    504: "the time limit",
}
_nullable_text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _nullable_text,
                "code": _nullable_text,
            },
        }
    },
}


def describe(app: FastAPI, has_key: bool) -> None:
    """Replaces the application's description with a complete one."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, has_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _description(app: FastAPI, has_key: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    components.clear()
    components["Error"] = ERROR_SCHEMA
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            statuses = [404, 500] if path == "/v1/models/{name}" else [503] if path == "/health" else []
            statuses = list(ERRORS) if path in BODIES else statuses
            if has_key and path.startswith("/v1"):
                operation["security"] = [{"key": []}]
                statuses = [401, *statuses]
            kept = {"200": operation["responses"]["200"]}
            operation["responses"] = kept | {str(status): _error(status) for status in statuses}
    for path, body in BODIES.items():
        found = body.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(found.pop("$defs", {}))
        components[body.__name__] = _closed(found)
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        operation = schema["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": content}
        operation["responses"]["200"]["content"] = {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        }
    schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if has_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


def _closed(body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body's schema with the fields that are checked by name instead of type, and no others."""
    own = body["properties"]
    more: dict[str, Any] = {name: {"description": "ignored"} for name in IGNORED}
    more |= {name: {"enum": [*values, None], "description": "not supported"} for name, values in NEUTRAL.items()}
    more |= {name: own.get(field, {}) for name, field in ALIASES.items() if field in own}
    return {**body, "properties": own | dict(sorted(more.items())), "additionalProperties": False}


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": ERRORS[status], "content": content}
