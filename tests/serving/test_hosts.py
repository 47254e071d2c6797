"""Which names and which pages a server answers to."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from decausal.serving.hosts import Hosts, is_public
from tests.serving.running import Running, converted, running

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
OWN_NAME = socket.gethostname()


@pytest.mark.parametrize(
    ("listening", "allowed", "host", "is_answered"),
    [
        (LOOPBACK, (), "127.0.0.1:8000", True),
        (LOOPBACK, (), "localhost", True),
        (LOOPBACK, (), "LocalHost.:8000", True),
        (LOOPBACK, (), "app.localhost:8000", True),
        (LOOPBACK, (), "[::1]:8000", True),
        (LOOPBACK, (), "127.8.8.8", True),
        (LOOPBACK, (), "evil.example", False),
        (LOOPBACK, (), "evil.example:8000", False),
        (LOOPBACK, (), "127.0.0.1.evil.example", False),
        (LOOPBACK, (), "localhost.evil.example", False),
        (LOOPBACK, (), "evil.example@127.0.0.1:x", False),
        (LOOPBACK, (), "192.168.1.7", False),
        (LOOPBACK, (), "", False),
        (LOOPBACK, (), "[::1", False),
        (LOOPBACK, ("llm.example.com",), "LLM.example.com:443", True),
        (LOOPBACK, ("llm.example.com",), "www.llm.example.com", False),
        (LOOPBACK, ("*",), "evil.example", True),
        ("192.168.1.7", (), "192.168.1.7:8000", True),
        ("192.168.1.7", (), "localhost", True),
        ("192.168.1.7", (), "192.168.1.8", False),
        (EVERYWHERE, (), "192.168.1.7:8000", True),
        (EVERYWHERE, (), "[fe80::1]:8000", True),
        (EVERYWHERE, (), OWN_NAME, True),
        (EVERYWHERE, (), "evil.example", False),
        ("::", (), "192.168.1.7:8000", True),
    ],
)
def test_a_server_is_called_by_its_own_names(
    listening: str, allowed: tuple[str, ...], host: str, is_answered: bool
) -> None:
    refusal = Hosts(listening, allowed).refusal([(b"host", host.encode())])
    assert (refusal is None) == is_answered
    assert refusal is None or (refusal.status, refusal.code) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    ("listening", "allowed", "host", "origin", "is_answered"),
    [
        (LOOPBACK, (), "127.0.0.1:8000", "http://127.0.0.1:8000", True),
        (LOOPBACK, (), "localhost:8000", "http://localhost:3000", True),
        (LOOPBACK, (), "127.0.0.1:8000", "http://localhost:8000", True),
        (LOOPBACK, (), "127.0.0.1:8000", "https://evil.example", False),
        (LOOPBACK, (), "127.0.0.1:8000", "http://127.0.0.1.evil.example", False),
        (LOOPBACK, (), "127.0.0.1:8000", "null", False),
        (LOOPBACK, (), "127.0.0.1:8000", "chrome-extension://abcdef", False),
        (LOOPBACK, (), "127.0.0.1:8000", "http://[", False),
        (LOOPBACK, ("llm.example.com",), "127.0.0.1:8000", "https://llm.example.com", True),
        (LOOPBACK, ("*",), "127.0.0.1:8000", "https://evil.example", True),
        (EVERYWHERE, (), "192.168.1.7:8000", "http://192.168.1.7:8000", True),
        (EVERYWHERE, (), "192.168.1.7:8000", "http://203.0.113.7", False),
    ],
)
def test_a_server_answers_its_own_pages_alone(
    listening: str, allowed: tuple[str, ...], host: str, origin: str, is_answered: bool
) -> None:
    headers = [(b"host", host.encode()), (b"origin", origin.encode())]
    assert (Hosts(listening, allowed).refusal(headers) is None) == is_answered


def test_who_sends_neither_is_no_browser_and_is_answered() -> None:
    assert Hosts(LOOPBACK).refusal([]) is None


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("10.0.0.1", True)],
)
def test_what_others_reach_is_public(host: str, public: bool) -> None:
    assert is_public(host) == public


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running([converted()], api_key="secret") as found:
        yield found


def test_a_page_under_another_name_reads_nothing(server: Running) -> None:
    key = {"Authorization": "Bearer secret"}
    body = {"prompt": "a", "max_tokens": 1}
    with server.client(headers=key) as client:
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            for path in ("/", "/metrics", "/v1/models", "/none", "/openapi.json"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 403, path
                assert answer.json()["error"]["code"] == "host_not_allowed"
                assert "--allowed_hosts evil.example" in answer.json()["error"]["message"]
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 403
            assert client.get("/health", headers=headers).status_code == 200
        own = {"Origin": server.url}
        assert client.post("/v1/completions", json=body, headers=own).status_code == 200
