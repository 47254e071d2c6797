"""One request's fault is no other's: whatever is sent while rows run, these become what they become alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from decausal.models.checkpoint import Converted
from decausal.sampling.settings import ALIASES
from tests.serving.running import converted, running

TEXT = "/v1/completions"
COUNTS = ("num_steps", "top_k", "window", "cache_refresh")
REALS = ("threshold", "entropy_bound", "temperature", "top_p", "min_p", "guidance", "remask_rate")
BESIDE: dict[str, dict[str, Any]] = {
    "cache_refresh": {"window": 4, "cache": "dual"},
    "remask_rate": {"remask": "remdm", "num_steps": 4},
}
NUM_ROWS = 10


def named(*names: str) -> list[str]:
    """Names of settings, and what else they are called."""
    return [*names, *(alias for alias, name in ALIASES.items() if name in names)]


POISON: list[dict[str, Any]] = [
    *({name: value} for name in named(*COUNTS) for value in (2**31, 2**63 - 1, 2**63, 2**64, 10**400)),
    *({name: value} for name in named(*REALS) for value in (5e-324, 1e-300, 1e-40, 1e39, 1e308, 10**400)),
    *({"gen_length": value} for value in (2**31, 2**63)),
    *({"max_tokens": value} for value in (2**31, 2**63, 10**400)),
    *({"n": value} for value in (2**31, 2**63)),
    *({"logprobs": value} for value in (2**31, 2**63)),
    *({"stop_token_ids": [value]} for value in (2**31, 2**63, 10**400)),
    *({"prompt": [value]} for value in (2**31, 2**63, 10**400)),
]


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@contextmanager
def held(model: Converted) -> Iterator[threading.Event]:
    """Every pass of the model waits until the event is set."""
    goes_on = threading.Event()

    def wait(*call: Any) -> None:
        goes_on.wait(60)

    hook = model.model.base_model.register_forward_pre_hook(wait)
    try:
        yield goes_on
    finally:
        goes_on.set()
        hook.remove()


def long_requests() -> list[dict[str, Any]]:
    """Ten of different lengths and settings, which draw at random."""
    shared = {"prompt": "import", "temperature": 1.0}
    return [{**shared, "max_tokens": 20 + i, "num_steps": 5 + i, "seed": i, "top_k": 5 + i} for i in range(NUM_ROWS)]


def test_each_poison_value_is_refused_by_name_while_ten_rows_run_and_become_what_they_become_alone(
    model: Converted,
) -> None:
    with running([model]) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        ask = lambda body: client.post(TEXT, json=body).json()["choices"][0]["text"]  # noqa: E731
        alone = [ask(body) for body in long_requests()]
        with held(model) as goes_on, ThreadPoolExecutor(NUM_ROWS) as pool:
            answers = [pool.submit(ask, body) for body in long_requests()]
            server.wait_for_rows(NUM_ROWS)
            for poison in POISON:
                (name,) = poison
                found = client.post(TEXT, json={"prompt": "a", "max_tokens": 4, **BESIDE.get(name, {}), **poison})
                assert found.status_code == 400, (poison, found.text)
                error = found.json()["error"]
                assert error["param"] in (ALIASES.get(name, name), f"{name}.0"), error
                assert "\n" not in error["message"]
                assert len(error["message"]) < 700, error
            assert server.num_rows == NUM_ROWS
            goes_on.set()
            assert [answer.result() for answer in answers] == alone
