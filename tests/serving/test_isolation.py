"""One request's fault is no other's: whatever is sent while rows run, these become what they become alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from torch import Tensor

from decausal.models.checkpoint import Converted
from decausal.sampling.settings import ALIASES
from tests.gated_models import FACTS as GATED
from tests.hangs import PATIENCE
from tests.serving.running import converted, running

TEXT = "/v1/completions"
COUNTS = ("num_steps", "top_k", "window", "cache_refresh", "draft_length")
REALS = ("threshold", "entropy_bound", "temperature", "top_p", "min_p", "guidance", "remask_rate")
BESIDE: dict[str, dict[str, Any]] = {
    "cache_refresh": {"window": 4, "cache": "dual"},
    "remask_rate": {"remask": "remdm", "num_steps": 4},
}
NUM_ROWS = 10


LAYOUTS: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "block": {"layout": "block", "block_size": 4},
    "speculative": {"layout": "block", "block_size": 4},
    "gated": GATED,
}
SPECULATIVE = ("speculative", "gated")


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
        goes_on.wait(PATIENCE)

    hook = model.model.base_model.register_forward_pre_hook(wait)
    try:
        yield goes_on
    finally:
        goes_on.set()
        hook.remove()


@contextmanager
def failing(model: Converted, fails: Callable[[Tensor], bool]) -> Iterator[list[int]]:
    """Passes raise where their ids are such; gives a list with an entry for each pass that did."""
    failures: list[int] = []

    def look(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if fails(options["input_ids"]):
            failures.append(1)
            raise RuntimeError("this row is not to be read")

    hook = model.model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield failures
    finally:
        hook.remove()


def long_requests(layout: str = "bidirectional") -> list[dict[str, Any]]:
    """Ten of different lengths and settings, which draw at random."""
    shared = {"prompt": "import", "temperature": 1.0}
    speculative = {"speculative": True, "num_steps": None} if layout in SPECULATIVE else {}
    return [
        {**shared, "max_tokens": 20 + i, "num_steps": 5 + i, "seed": i, "top_k": 5 + i, **speculative}
        for i in range(NUM_ROWS)
    ]


@pytest.mark.parametrize("layout", ["bidirectional", "gated"])
def test_each_poison_value_is_refused_by_name_while_ten_rows_run_and_become_what_they_become_alone(layout: str) -> None:
    model = converted(**LAYOUTS[layout])
    with running([model]) as server, server.client() as client:
        ask = lambda body: client.post(TEXT, json=body).json()["choices"][0]["text"]  # noqa: E731
        alone = [ask(body) for body in long_requests(layout)]
        with held(model) as goes_on, ThreadPoolExecutor(NUM_ROWS) as pool:
            answers = [pool.submit(ask, body) for body in long_requests(layout)]
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


def asked(client: httpx.Client, body: dict[str, Any]) -> str:
    """The text of an answer; streamed where the seed is odd."""
    if body["seed"] % 2 == 0:
        return client.post(TEXT, json=body).json()["choices"][0]["text"]
    lines = client.post(TEXT, json={**body, "stream": True}).text.splitlines()
    assert lines[-2] == "data: [DONE]"
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2] if line)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_fails_ends_the_row_that_made_it_fail_and_no_other(layout: str) -> None:
    model = converted(**LAYOUTS[layout])
    bodies = long_requests(layout)
    with running([model]) as server, server.client() as client:
        alone = [asked(client, body) for body in bodies]
        character = next(each for each in "~@^|" if each not in "".join(alone))
        poison = model.tokenizer.convert_tokens_to_ids(character)
        with (
            failing(model, lambda ids: bool((ids[:, 0] == poison).any())) as failures,
            ThreadPoolExecutor(NUM_ROWS + 1) as pool,
        ):
            with held(model) as goes_on:
                answers = [pool.submit(asked, client, body) for body in bodies]
                server.wait_for_rows(NUM_ROWS)
                guilty = pool.submit(client.post, TEXT, json={**bodies[0], "prompt": f"{character} a", "n": 2})
                server.wait_for_rows(NUM_ROWS + 2)
                goes_on.set()
                assert [answer.result() for answer in answers] == alone
            assert guilty.result().status_code == 500
            assert guilty.result().json()["error"]["code"] == "engine_failed"
        assert failures
        server.wait_until_idle()
        assert [asked(client, body) for body in bodies] == alone


@pytest.mark.parametrize("layout", ["bidirectional", *SPECULATIVE])
def test_a_step_that_fails_once_harms_nobody(layout: str) -> None:
    model = converted(**LAYOUTS[layout])
    bodies = long_requests(layout)
    with running([model]) as server, server.client() as client:
        alone = [asked(client, body) for body in bodies]
        passes: list[int] = []

        def fails(ids: Tensor) -> bool:
            passes.append(len(ids))
            return passes.count(NUM_ROWS) == 3 and len(ids) == NUM_ROWS

        with failing(model, fails) as failures, ThreadPoolExecutor(NUM_ROWS) as pool:
            with held(model) as goes_on:
                answers = [pool.submit(asked, client, body) for body in bodies]
                server.wait_for_rows(NUM_ROWS)
                goes_on.set()
            assert [answer.result() for answer in answers] == alone
        assert len(failures) == 1


def test_rows_that_fail_together_alone_are_written_in_smaller_batches(model: Converted) -> None:
    with running([model]) as server, server.client() as client:
        alone = [asked(client, body) for body in long_requests()]
        with failing(model, lambda ids: len(ids) > 3) as failures, ThreadPoolExecutor(NUM_ROWS) as pool:
            assert list(pool.map(lambda body: asked(client, body), long_requests())) == alone
        assert failures
        server.wait_until_idle()


def test_an_engine_that_cannot_be_made_anew_ends_its_answers_and_is_reported_by_health(model: Converted) -> None:
    with running([model]) as server, server.client() as client:

        def broken() -> Any:
            raise RuntimeError("no device")

        server.models[0].worker._make_engine = broken
        with failing(model, lambda ids: True):
            found = client.post(TEXT, json=long_requests()[0])
        assert found.status_code == 500
        server.models[0].worker._thread.join(10)
        assert client.get("/health").status_code == 503
        assert client.post(TEXT, json=long_requests()[0]).json()["error"]["code"] == "engine_stopped"
