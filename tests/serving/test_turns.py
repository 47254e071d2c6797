"""Nobody waits for all rows of another: clients take turns, and so do the requests of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from decausal.models.checkpoint import Converted
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.serving.answer import Answer
from decausal.serving.turns import Turns
from tests.serving.running import Running, converted, running

TEXT = "/v1/completions"
MANY = {"prompt": "a", "max_tokens": 8, "num_steps": 8, "n": 30, "seed": 0}
FEW = {"prompt": "b", "max_tokens": 2, "num_steps": 2, "seed": 0}
JOB = Job(Row(([1], []), (1,), "row"), SamplerSettings(), seed=0)


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@contextmanager
def slow(model: Converted) -> Iterator[None]:
    hook = model.model.base_model.register_forward_pre_hook(lambda *call: time.sleep(0.02))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def client_at(server: Running, address: str) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(local_address=address)
    with server.client(transport=transport) as client:
        yield client


def order(*added: tuple[str, str, int]) -> str:
    """The requests in whose turn rows are taken, from (client, request, number of rows)."""

    async def taken() -> str:
        turns, names, found = Turns(), {}, ""
        for client, name, number in added:
            answer = Answer([JOB] * number, client)
            names[answer] = name
            turns.add(answer)
        while turns:
            before = len(turns)
            found += names[turns.take().answer]
            assert len(turns) == before - 1
        return found

    return asyncio.run(taken())


def test_clients_take_turns_and_so_do_the_requests_of_each() -> None:
    assert order(("x", "a", 4)) == "aaaa"
    assert order(("x", "a", 4), ("y", "b", 2)) == "ababaa"
    assert order(("x", "a", 2), ("x", "b", 1), ("y", "c", 3)) == "acbcac"
    assert order(("x", "a", 0), ("y", "b", 1)) == "b"


def test_a_request_that_is_dropped_leaves_its_turns_to_others() -> None:
    async def left() -> list[str]:
        turns, answers = Turns(), [Answer([JOB] * 2, client) for client in "xxy"]
        for answer in answers:
            turns.add(answer)
        turns.drop(answers[0])
        turns.drop(answers[2])
        turns.drop(answers[2])
        found = [row.answer for row in turns]
        turns.drop(answers[1])
        assert not turns
        return ["abc"[answers.index(answer)] for answer in found]

    assert asyncio.run(left()) == ["b", "b"]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_who_asks_for_little_does_not_wait_for_all_that_another_request_asks_for(
    model: Converted, address: str
) -> None:
    with (
        running([model], max_rows=2) as server,
        client_at(server, "127.0.0.1") as busy,
        client_at(server, address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        alone = client.post(TEXT, json=FEW).json()["choices"][0]["text"]
        all_alone = [choice["text"] for choice in busy.post(TEXT, json=MANY).json()["choices"]]
        with slow(model):
            many = pool.submit(busy.post, TEXT, json=MANY)
            server.wait_for_rows(30)
            answer = client.post(TEXT, json=FEW)
            assert server.num_rows > 20
        assert answer.json()["choices"][0]["text"] == alone
        assert [choice["text"] for choice in many.result().json()["choices"]] == all_alone


def test_one_client_cannot_fill_the_queue(model: Converted) -> None:
    def bodies(client: httpx.Client, **more: Any) -> int:
        return client.post(TEXT, json={**MANY, **more}).status_code

    with (
        running([model], max_rows=2, max_queue=64) as server,
        client_at(server, "127.0.0.1") as busy,
        client_at(server, "127.0.0.2") as client,
        ThreadPoolExecutor(3) as pool,
    ):
        assert bodies(busy, n=65) == 400  # two places of 66 are kept for others
        with slow(model):
            many = [pool.submit(bodies, busy, n=32) for _ in range(2)]
            server.wait_for_rows(64)
            assert bodies(busy, n=1) == 429
            assert client.post(TEXT, json={**FEW, "n": 2}).status_code == 200
        assert [found.result() for found in many] == [200, 200]
        server.wait_until_idle()
        assert not server.models[0].worker._rows_of
