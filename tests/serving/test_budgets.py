"""What a request may cost before it is refused, and how long a connection may keep the server waiting."""

from __future__ import annotations

import gc
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from decausal.models.checkpoint import Converted
from decausal.serving import reading, texts
from decausal.serving.connection import MAX_HEAD_BYTES
from decausal.serving.counting import CHARACTERS_PER_TOKEN, refuse_long_text
from decausal.serving.errors import ApiError
from decausal.serving.parsing import parse
from decausal.serving.plans import completion_plan
from decausal.serving.reading import Work
from decausal.serving.schema import CompletionBody
from decausal.serving.server import KEEP_ALIVE_SECONDS
from decausal.serving.settings import LARGE
from tests.families import MAX_LENGTH
from tests.hangs import PATIENCE
from tests.serving.running import Running, converted, running

TEXT = "/v1/completions"
SHORT = {"prompt": "a", "max_tokens": 2, "seed": 0}
LATE = ApiError(504, "late")


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@pytest.fixture(scope="module")
def server(model: Converted) -> Iterator[Running]:
    with running([model], max_rows=4, max_queue=28) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@contextmanager
def prompts_read(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Any] = lambda: None) -> Iterator[list[str]]:
    """The prompts that become tokens, each after a wait."""
    found: list[str] = []
    original = texts.prompt_ids

    def spy(converted: Converted, text: str) -> list[int]:
        found.append(text)
        wait()
        return original(converted, text)

    with monkeypatch.context() as patch:
        patch.setattr(texts, "prompt_ids", spy)
        yield found


def test_rows_are_counted_before_a_prompt_is_read(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with prompts_read(monkeypatch) as read:
        for prompts, n, status in ((33, 1, 400), (1, 33, 400), (11, 3, 400), (16_384, 128, 400), (60_000, 128, 400)):
            answer = client.post(TEXT, json={"prompt": ["a"] * prompts, "n": n})
            assert answer.status_code == status
        assert read == []
        assert client.post(TEXT, json={**SHORT, "prompt": ["a"] * 8, "n": 4}).status_code == 200
        assert len(read) == 8
    assert server.num_rows == 0


def test_a_full_queue_is_reported_before_a_prompt_is_read(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = server.models[0].worker.reserve(30)
    try:
        with prompts_read(monkeypatch) as read:
            assert client.post(TEXT, json={**SHORT, "n": 3}).status_code == 429
            assert read == []
            assert client.post(TEXT, json={**SHORT, "n": 2}).status_code == 200
    finally:
        places.release()
        places.release()
    assert server.num_rows == 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a " * MAX_LENGTH},
        {"prompt": "a", "temperature": -1},
        {"prompt": [10**6]},
        {"prompt": "a", "echo": True, "max_tokens": 0, "logprobs": 1},
        {"prompt": "a", "suffix": "b", "speculative": True},
    ],
    ids=str,
)
def test_a_request_that_is_refused_keeps_no_places(server: Running, client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post(TEXT, json={**body, "n": 4}).status_code == 400
    assert server.num_rows == 0


class PerCharacter:
    """A tokenizer whose tokens hold so many characters; counts those that it reads."""

    def __init__(self, size: int) -> None:
        self.size, self.num_read = size, 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.num_read += len(text)
        return {"input_ids": [0] * -(-len(text) // self.size)}


@pytest.mark.parametrize("max_tokens", [64, 4096])
def test_of_a_text_of_megabytes_no_more_is_read_than_shows_that_it_is_too_long(max_tokens: int) -> None:
    tokenizer, text = PerCharacter(1), "a" * 2**22
    with pytest.raises(ApiError, match=f"more than {max_tokens:,} tokens"):
        refuse_long_text(tokenizer, text, max_tokens, "the prompt", "prompt", Work(60.0, LATE))
    assert tokenizer.num_read <= 2 * CHARACTERS_PER_TOKEN * max_tokens
    tokenizer = PerCharacter(64)
    refuse_long_text(tokenizer, "a" * 60 * max_tokens, max_tokens, "the prompt", "prompt", Work(60.0, LATE))
    with pytest.raises(ApiError, match="late"):
        refuse_long_text(tokenizer, text, max_tokens, "the prompt", "prompt", Work(0.0, LATE))


def test_prompts_are_read_until_the_deadline_and_no_longer(model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(60.0, LATE)
    body = CompletionBody(prompt=[f"prompt {number}" for number in range(20)])
    with (
        prompts_read(monkeypatch, lambda: len(read) == 3 and work.stop()) as read,
        pytest.raises(ApiError, match="late"),
    ):
        completion_plan(body, model, MAX_LENGTH, work)
    assert len(read) == 3
    with prompts_read(monkeypatch) as read, pytest.raises(ApiError, match="late"):
        completion_plan(body, model, MAX_LENGTH, Work(0.0, LATE))
    assert read == []


def test_a_client_that_leaves_while_its_prompts_are_read_frees_its_places_at_once(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    raw = json.dumps({**SHORT, "prompt": ["a"] * 20}).encode()
    with prompts_read(monkeypatch, lambda: goes_on.wait(PATIENCE)) as read:
        with connection(server) as client:
            client.sendall(head(len(raw)) + raw)
            deadline = time.monotonic() + PATIENCE
            while not read and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.num_rows == 20
        server.wait_until_idle()  # the thread is still inside of the first prompt
        goes_on.set()
        assert read == ["a"]


def test_no_garbage_is_looked_for_among_the_parts_of_a_large_body() -> None:
    collections: list[str] = []

    def count(phase: str, info: dict[str, Any]) -> None:
        collections.append(phase)

    raw = b'{"prompt": [' + b"[1]," * LARGE + b"[1]]}"
    gc.callbacks.append(count)
    try:
        with pytest.raises(ApiError, match="at most 16384 prompts"):
            parse(raw, CompletionBody)
    finally:
        gc.callbacks.remove(count)
    assert collections.count("start") <= 2  # what is due once it may be looked for again
    assert gc.isenabled()


def test_small_bodies_do_not_wait_for_large_ones_of_which_few_are_in_memory(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    large = json.dumps({**SHORT, "user": "x" * 2 * LARGE}).encode()
    whole_bodies: list[int] = []
    original = reading._whole_body

    async def spy(*arguments: Any) -> bytes:
        raw = await original(*arguments)
        whole_bodies.append(len(raw))
        return raw

    monkeypatch.setattr(reading, "_whole_body", spy)
    monkeypatch.setattr("decausal.serving.app.parse", _slow_where_large(goes_on))
    clients = [connection(server) for _ in range(reading.MAX_LARGE_BODIES + 4)]
    try:
        for each in clients:
            threading.Thread(target=each.sendall, args=(head(len(large)) + large,), daemon=True).start()
        deadline = time.monotonic() + PATIENCE
        while len(whole_bodies) < reading.MAX_LARGE_BODIES and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.post(TEXT, json=SHORT).status_code == 200
        assert [size for size in whole_bodies if size > LARGE] == [len(large)] * reading.MAX_LARGE_BODIES
        goes_on.set()
        assert all(answered(each).startswith(b"HTTP/1.1 200") for each in clients)
    finally:
        goes_on.set()
        for each in clients:
            each.close()


def _slow_where_large(goes_on: threading.Event) -> Callable[..., Any]:
    def slow(raw: bytes, kind: type) -> Any:
        if len(raw) > LARGE:
            goes_on.wait(PATIENCE)
        return parse(raw, kind)

    return slow


def connection(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def head(length: int, *more: str) -> bytes:
    lines = [
        f"POST {TEXT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def answered(client: socket.socket) -> bytes:
    """All that comes until the connection closes, or a whole answer is there."""
    found = b""
    while piece := client.recv(2**16):
        found += piece
        before, is_whole, after = found.partition(b"\r\n\r\n")
        lengths = [line for line in before.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if is_whole and lengths and len(after) >= int(lengths[0].split(b":")[1]):
            break
    return found


SENT = {
    "nothing": b"",
    "half a line": b"GET /hea",
    "half a head": b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": head(100) + b'{"prompt": ',
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nab",
    "half a second request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal",
}


@pytest.fixture(scope="module")
def hasty(model: Converted) -> Iterator[Running]:
    with running([model], timeout=1.0) as found:
        yield found


@pytest.mark.parametrize("sent", SENT)
def test_who_keeps_the_server_waiting_is_left_however_often_more_comes(hasty: Running, sent: str) -> None:
    with connection(hasty) as client:
        client.sendall(SENT[sent])
        reported = b""
        client.settimeout(0.1)
        deadline = time.monotonic() + KEEP_ALIVE_SECONDS / 2  # after which uvicorn closes what is idle
        while time.monotonic() < deadline:
            try:
                piece = client.recv(2**16)
                if not piece:
                    break
                reported += piece
            except TimeoutError:
                if sent != "nothing":
                    client.sendall(b"x")  # a head or a body that comes byte by byte
            except OSError:
                break
        else:
            pytest.fail(f"the connection is still open after {reported!r}")
    if sent == "half a body":
        assert reported.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_too_slow"' in reported


def test_a_head_without_end_is_refused_before_it_fills_the_memory(server: Running) -> None:
    with connection(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_HEAD_BYTES)
        reported = answered(client)
    assert reported.startswith(b"HTTP/1.1 431")
    assert json.loads(reported.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("junk", [b"\x00\xff" * 10 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_is_reported_in_openais_shape(server: Running, junk: bytes) -> None:
    with connection(server) as client:
        client.sendall(junk)
        reported = answered(client)
    assert reported.startswith(b"HTTP/1.1 400")
    assert json.loads(reported.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_body_that_stops_being_http_while_its_request_is_answered_is_no_traceback(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with caplog.at_level(logging.ERROR), connection(server) as client:
        client.sendall(chunked.replace(b"POST /v1/completions", b"POST /v1/none"))
        assert client.recv(2**16).startswith(b"HTTP/1.1 404")
        client.sendall(b"zz\r\nno chunk\r\n")
        while client.recv(2**16):
            pass
    assert caplog.records == []


def test_a_body_comes_through_with_an_offer_of_another_protocol(server: Running) -> None:
    raw = json.dumps(SHORT).encode()
    offer = (
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    with connection(server) as client:
        for _ in range(2):
            client.sendall(head(len(raw), *offer) + raw)
            reported = answered(client)
            assert reported.startswith(b"HTTP/1.1 200")
            assert json.loads(reported.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 2


def test_a_client_that_streams_without_reading_holds_its_rows_no_longer_than_the_timeout(model: Converted) -> None:
    passes: list[int] = []

    def slow(*call: Any) -> None:
        passes.append(1)
        time.sleep(0.2)

    hook = model.model.base_model.register_forward_pre_hook(slow)
    body = {
        "prompt": "import",
        "max_tokens": 50,
        "num_steps": 50,
        "n": 16,
        "stream": True,
        "decausal": {"events": True},
    }
    raw = json.dumps(body).encode()
    try:
        with running([model], timeout=3.0, send_buffer=4096) as server, socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = server.url.removeprefix("http://").split(":")
            client.connect((host, int(port)))
            client.sendall(head(len(raw)) + raw)
            server.wait_for_rows(16)
            server.wait_until_idle()
            assert len(passes) < 50
    finally:
        hook.remove()
