"""A full queue, a slow answer, an engine that fails: reported in time, and nobody else is touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
from decausal.serving.server import uvicorn_config
from decausal.serving.settings import ServeSettings
from decausal.serving.worker import Worker
from tests.serving.running import converted, running

SLOW = {"prompt": "import", "max_tokens": 50, "num_steps": 50, "seed": 0}


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


def test_a_full_queue_is_reported_at_once_with_the_time_to_wait(model: Converted) -> None:
    with running([model], max_rows=1, max_queue=2) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**SLOW, "n": 3, "stream": True}):
            answer = client.post("/v1/completions", json=SLOW)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert answer.json()["error"]["code"] == "queue_full"
        server.wait_until_idle()
        assert client.post("/v1/completions", json=SLOW).status_code == 200
        never = client.post("/v1/completions", json={**SLOW, "n": 4})
        assert never.status_code == 400
        assert never.json()["error"]["code"] == "too_many_choices"


def test_openais_client_waits_for_a_place_by_itself(model: Converted) -> None:
    with (
        running([model], max_rows=2, max_queue=1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        requests = [{"model": "tiny", "prompt": "import", "max_tokens": 30, "seed": seed} for seed in range(8)]
        answers = pool.map(lambda request: client.completions.create(**request), requests)
        texts = [found.choices[0].text for found in answers]
    assert texts == [generate(model, "import", max_new_tokens=30, seed=seed).text for seed in range(8)]


@contextmanager
def before_every_pass(model: Converted, action: Callable[[], None]) -> Iterator[None]:
    """Does something whenever the model's body runs."""
    hook = model.model.base_model.register_forward_pre_hook(lambda *call: action())
    try:
        yield
    finally:
        hook.remove()


def test_an_answer_that_takes_too_long_is_given_up(model: Converted) -> None:
    with (
        before_every_pass(model, lambda: time.sleep(0.2)),
        running([model], timeout=2.0) as server,
        server.client() as client,
    ):
        answer = client.post("/v1/completions", json=SLOW)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        server.wait_until_idle()
        streamed = client.post("/v1/completions", json={**SLOW, "stream": True}).text
        assert '"code":"timeout"' in streamed.splitlines()[-4]
        assert streamed.endswith("data: [DONE]\n\n")
        server.wait_until_idle()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
            stream = other.completions.create(
                model="tiny", prompt="import", max_tokens=50, stream=True, extra_body={"num_steps": 50}
            )
            with pytest.raises(openai.APIError, match="longer than"):
                list(stream)


def test_a_row_that_fails_alone_ends_its_answer_and_the_server_goes_on(model: Converted) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with running([model]) as server, server.client() as client:
        with before_every_pass(model, fail):
            answer = client.post("/v1/completions", json=SLOW)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_failed"
        assert "out of memory" not in answer.text
        assert client.get("/health").status_code == 200
        again = client.post("/v1/completions", json=SLOW)
        assert again.json()["choices"][0]["text"] == generate(model, "import", max_new_tokens=50, num_steps=50).text
        server.wait_until_idle()


def test_rows_are_no_longer_than_the_server_says(model: Converted) -> None:
    with running([model], max_total_tokens=12) as server, server.client() as client:
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 12
        answer = client.post("/v1/completions", json={"prompt": "import", "max_tokens": 30})
        assert "at most 12" in answer.json()["error"]["message"]
        found = client.post("/v1/completions", json={"prompt": "import"}).json()
        assert found["usage"]["total_tokens"] == 12


def test_an_idle_connection_is_closed_by_the_client_and_not_under_its_next_request() -> None:
    kept_by_clients = httpx.Limits().keepalive_expiry
    assert kept_by_clients is not None
    assert uvicorn_config(None, ServeSettings()).timeout_keep_alive > 2 * kept_by_clients


def test_an_engine_that_has_stopped_is_reported_by_health(model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    with running([model]) as server, server.client() as client:
        monkeypatch.setattr(Worker, "is_alive", property(lambda self: False))
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=SLOW).status_code == 503


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"max_rows": 0},
        {"max_rows": 2**63},
        {"max_queue": -1},
        {"max_queue": 2**63},
        {"max_total_tokens": 1},
        {"max_total_tokens": 2**63},
        {"timeout": 0.0},
        {"api_key": ""},
        {"api_key": " a"},
        {"model_name": ""},
        {"allowed_hosts": ("",)},
        {"allowed_hosts": ("https://llm.example.com",)},
        {"allowed_hosts": ("llm.example.com:443",)},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
        ServeSettings(**wrong)
