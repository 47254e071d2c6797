"""The application against its own description: whatever fits it or breaks it, no answer is the server's fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from tests.serving.running import Running, converted, running

OPERATIONS = (
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
)
NUM_EXAMPLES = 50
"""Of each kind, fitting and breaking the description, per operation."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running([converted()], max_total_tokens=24, max_rows=8) as found:
        yield found


def test_the_description_holds_every_endpoint(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = {(operation.ok().path, operation.ok().method.upper()) for operation in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(path, "POST", GenerationMode.NEGATIVE) for path, method in OPERATIONS if method == "POST"],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_request_makes_the_server_fail(server: Running, path: str, method: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]

    @settings(
        max_examples=NUM_EXAMPLES if method == "POST" else 5,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(operation, mode))
    def no_failure(case: Case) -> None:
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = likely(case.body)
        answer = case.call(base_url=server.url)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    statuses: list[int] = []
    no_failure()
    if mode == GenerationMode.POSITIVE and "{" not in path:
        assert statuses.count(200) >= len(statuses) / 5, statuses
    server.wait_until_idle()


def likely(body: dict[str, Any]) -> dict[str, Any]:
    """What of a body can be accepted: most are refused for schedules that exclude each other, or for their length."""
    kept = ("echo", "logprobs", "messages", "n", "prompt", "stop", "stream", "stream_options", "suffix", "top_logprobs")
    found = {name: value for name, value in body.items() if name in kept and value is not None}
    if "messages" not in found:
        found.setdefault("prompt", "a")
    else:
        found["messages"] = [{**message, "content": message["content"][:4]} for message in found["messages"][:1]]
    return found | {"max_tokens": 3}


def cases(operation: schemathesis.schemas.APIOperation, mode: GenerationMode) -> st.SearchStrategy[Case]:
    return operation.as_strategy(generation_mode=mode)
