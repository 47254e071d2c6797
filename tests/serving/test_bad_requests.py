"""Whatever a client sends: the right status, an error in OpenAI's shape that helps, and a server that goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from decausal.models.checkpoint import Converted
from decausal.serving.parsing import IGNORED, NEUTRAL
from tests.families import EOS_ID, MAX_LENGTH
from tests.serving.running import Running, converted, running

MASK = "<|mask|>"


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@pytest.fixture(scope="module")
def server(model: Converted) -> Iterator[Running]:
    with running([model, converted(chat=False, layout="causal")], max_rows=2, max_body_bytes=2**21) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found
        answer = found.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "seed": 0})
        assert answer.status_code == 200, "the server did not survive"
        assert found.get("/health").json() == {"status": "ok"}


def refused(answer: httpx.Response, status: int, param: str | None = None, says: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert says in error["message"], error
    assert "\n" not in error["message"]


TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "yes"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (TEXT, {}, 400, "prompt", "missing"),
    (TEXT, {"prompt": 3}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": []}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": ["a", 1]}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": [[1], []]}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": [-1]}, 400, "prompt", "must be a string"),
    (TEXT, {"prompt": [10**30]}, 400, "prompt", "vocabulary"),
    (TEXT, {"prompt": [EOS_ID + 100]}, 400, "prompt", "vocabulary"),
    (TEXT, {"prompt": f"a {MASK} b"}, 400, "prompt", "mask token"),
    (TEXT, {"prompt": "a", "suffix": MASK}, 400, "prompt", "mask token"),
    (TEXT, {"prompt": "a", "suffix": 3}, 400, "suffix", "should be a valid string"),
    (TEXT, {"prompt": "a", "suffix": "b", "model": "tiny-2"}, 400, "suffix", "layout 'causal'"),
    (TEXT, {"prompt": "a", "temperature": -1}, 400, "temperature", "0, or a number from 1e-20 to 1e+20"),
    (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "valid number"),
    (TEXT, {"prompt": "a", "temperature": True}, 400, "temperature", "valid number"),
    (TEXT, {"prompt": "a", "top_p": 1.5}, 400, "top_p", "from 1e-20 to 1"),
    (TEXT, {"prompt": "a", "top_k": 0}, 400, "top_k", "at least 1"),
    (TEXT, {"prompt": "a", "num_steps": 0}, 400, "num_steps", "at least 1"),
    (TEXT, {"prompt": "a", "num_steps": 4, "threshold": 0.5}, 400, "num_steps", "exclude each other"),
    (TEXT, {"prompt": "a", "num_steps": 4, "steps": 5}, 400, "num_steps", "given twice"),
    (
        TEXT,
        {"prompt": "a", "first_token_from_clean": True},
        400,
        "first_token_from_clean",
        "only in a model with layout",
    ),
    (
        TEXT,
        {"prompt": "a", "model": "tiny-2", "remasking": True, "seed": 1},
        400,
        "remask",
        "not possible under layout",
    ),
    (TEXT, {"prompt": "a", "confidence": "luck"}, 400, "confidence", "one of"),
    (TEXT, {"prompt": "a", "remask": 1}, 400, "remask", "boolean"),
    (TEXT, {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
    (TEXT, {"prompt": "a", "n": 129}, 400, "n", "less than or equal to 128"),
    (TEXT, {"prompt": "a", "n": 1.5}, 400, "n", "integer"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    (TEXT, {"prompt": "a", "max_tokens": 10**12}, 400, "max_tokens", f"at most {MAX_LENGTH}"),
    (TEXT, {"prompt": "a " * MAX_LENGTH}, 400, "prompt", f"at most {MAX_LENGTH}"),
    (TEXT, {"prompt": "a", "max_new_tokens": 3}, 400, "max_new_tokens", "'max_tokens'"),
    (TEXT, {"prompt": "a", "seed": 1.5}, 400, "seed", "integer"),
    (TEXT, {"prompt": "a", "repetition_penalty": 1.2}, 400, "repetition_penalty", "writes many tokens at once"),
    (TEXT, {"prompt": "a", "min_tokens": 4}, 400, "min_tokens", "not supported"),
    (TEXT, {"prompt": "a", "min_p": 1.5}, 400, "min_p", "0, or a number from 1e-20 to 1"),
    (TEXT, {"prompt": "a", "stop_token_ids": [-1]}, 400, "stop_token_ids.0", "greater than or equal to 0"),
    (TEXT, {"prompt": "a", "stop_token_ids": [10**9]}, 400, "stop_token_ids", "vocabulary"),
    (TEXT, {"prompt": "a", "stop": ""}, 400, "stop", "none of them empty"),
    (TEXT, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (TEXT, {"prompt": "a", "stop": "x" * 1025}, 400, "stop", "at most 1024 characters"),
    (TEXT, {"prompt": ["a"] * 60_000, "n": 128}, 400, "prompt", "at most 16384 prompts"),
    (TEXT, {"prompt": ["a"] * 1000, "n": 128}, 400, "n", "128,000 answers at once"),
    (TEXT, {"prompt": [[1]] * 60_000}, 400, "prompt", "at most 16384 prompts"),
    (TEXT, {"prompt": [1] * 60_000}, 400, "prompt", "has 60,000 tokens"),
    (TEXT, {"prompt": "a", "suffix": "b c" * 5000}, 400, "suffix", f"has more than {MAX_LENGTH} tokens"),
    (TEXT, {"decausal": {"parts": ["a", 1] * 257}}, 400, "decausal.parts", "at most 256"),
    (TEXT, {"decausal": {"parts": ["a"] * 20_000 + [1]}}, 400, "prompt", f"has more than {MAX_LENGTH} tokens"),
    (TEXT, {f"field{i}": 0 for i in range(300)}, 400, None, "fields, and at most 256"),
    (TEXT, {"decausal": {f"field{i}": 0 for i in range(300)}}, 400, "decausal", "300 fields, and at most 256"),
    (TEXT, {"prompt": "a", "x" * 2**19: 0}, 400, f"{'x' * 60} … {'x' * 60}", "unknown field"),
    (TEXT, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    (TEXT, {"prompt": "a", "stream": "yes"}, 400, "stream", "boolean"),
    (TEXT, {"prompt": "a", "stream_options": []}, 400, "stream_options", "dictionary"),
    (TEXT, {"prompt": "a", "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    (TEXT, {"prompt": "a", "zzzzqqq": None}, 400, "zzzzqqq", "unknown field"),
    (TEXT, {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
    (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of", "not supported"),
    (TEXT, {"prompt": "a", "model": "other"}, 404, "model", "there is: tiny, tiny-2"),
    (TEXT, {"prompt": "a", "model": 3}, 400, "model", "string"),
    (TEXT, {"prompt": "a", "suffix": "b", "speculative": True}, 400, None, "specul"),
    (TEXT, {"prompt": "a", "suffix": "b", "max_tokens": 2, "speculative": True}, 400, None, "specul"),
    (TEXT, {"prompt": "a", "decausal": {"event": True}}, 400, "decausal.event", "did you mean 'events'"),
    (TEXT, {"decausal": {"parts": ["a"]}}, 400, "decausal.parts", "at least one gap"),
    (TEXT, {"decausal": {"parts": ["a", 0]}}, 400, "decausal.parts", "at least 1 token"),
    (TEXT, {"decausal": {"parts": ["a", None]}}, 400, "decausal.parts", "ends with a gap of unknown length"),
    (TEXT, {"decausal": {"parts": ["a", None, 2, "b"]}}, 400, "decausal.parts", "without text between"),
    (TEXT, {"decausal": {"parts": ["a", None] * 9 + ["b"]}}, 400, "decausal.parts", "at most 8"),
    (TEXT, {"decausal": {"parts": ["a", True, "b"]}}, 400, "decausal.parts", "null (unknown length)"),
    (TEXT, {"decausal": {"parts": ["a" * MAX_LENGTH, None, "b"]}}, 400, "prompt", "shorten it"),
    (TEXT, {"decausal": {"parts": ["a", 2**63, "b"]}}, 400, "max_tokens", f"at most {MAX_LENGTH}"),
    (
        TEXT,
        {"decausal": {"parts": ["a", None, "b"], "max_gap": 2**63}},
        400,
        "decausal.max_gap",
        "less than 2147483648",
    ),
    (TEXT, {"decausal": {"parts": ["a", None, "b"], "max_gap": 0}}, 400, "decausal.max_gap", "greater than or equal"),
    (TEXT, {"decausal": {"parts": ["a", 1, "b"], "max_gap": 9}}, 400, "decausal.max_gap", "unknown length"),
    (
        TEXT,
        {"prompt": "a", "suffix": "b", "max_tokens": 2, "decausal": {"length_search": "grow"}},
        400,
        "decausal.length_search",
        "unknown length",
    ),
    (
        TEXT,
        {"prompt": "a", "suffix": "b", "decausal": {"length_search": "luck"}},
        400,
        "decausal.length_search",
        "'candidates' or 'grow'",
    ),
    (
        TEXT,
        {"prompt": "a", "suffix": "b", "remask": True, "num_steps": 2, "decausal": {"max_gap": -1}},
        400,
        "decausal.max_gap",
        "greater than or equal",
    ),
    (TEXT, {"decausal": {"parts": ["a", 100]}}, 400, "max_tokens", f"at most {MAX_LENGTH}"),
    (TEXT, {"prompt": "a", "decausal": {"parts": ["a", 1]}}, 400, "decausal.parts", "leave prompt"),
    (CHAT, {}, 400, "messages", "required"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": USER * 20_000}, 400, "messages", "at most 16384"),
    (CHAT, {"messages": [*USER, {**ANSWER, "tool_calls": [CALL] * 129}]}, 400, "messages.1.tool_calls", "at most 128"),
    (CHAT, {"messages": [{"role": "user", "content": "a b" * 5000}]}, 400, "messages", "has more than"),
    (CHAT, {"messages": "hi"}, 400, "messages", "list"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", "'text'"),
    (CHAT, {"messages": [{**USER[0], "tool_calls": [CALL]}]}, 400, "messages.0.tool_calls", "not supported"),
    (CHAT, {"messages": [{**USER[0], "content": None}]}, 400, "messages.0.content", "must be a string"),
    (CHAT, {"messages": [*USER, {**ANSWER, "tool_calls": [CALL]}]}, 400, "messages.1.tool_calls", "leaves"),
    (
        CHAT,
        {"messages": [*USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        400,
        "messages.1.tool_calls.0.function.arguments",
        "not JSON",
    ),
    (CHAT, {"messages": USER, "continue_final_message": True}, 400, "continue_final_message", "of role 'user'"),
    (
        CHAT,
        {"messages": [*USER, ANSWER], "continue_final_message": True, "add_generation_prompt": True},
        400,
        "continue_final_message",
        "exclude each other",
    ),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}},
        400,
        "chat_template_kwargs.enable_thinking",
        "reads no 'enable_thinking'",
    ),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        400,
        "chat_template_kwargs.chat_template",
        "not the chat template's",
    ),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, 400, "tools", "leaves 'tools' out"),
    (CHAT, {"messages": USER, "tools": [{}]}, 400, "tools.0.type", "required"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}] * 129}, 400, "tools", "at most 128"),
    (TEXT, {"prompt": "a", "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    (CHAT, {"messages": USER, "model": "tiny-2"}, 400, "messages", "no chat template"),
    (CHAT, {"messages": [{"role": "user", "content": MASK}]}, 400, "messages", "mask token"),
    (CHAT, {"messages": USER, "max_completion_tokens": 2**63}, 400, "max_completion_tokens", f"at most {MAX_LENGTH}"),
    (CHAT, {"messages": USER, "max_tokens": 2**63}, 400, "max_tokens", f"at most {MAX_LENGTH}"),
    (CHAT, {"messages": [{"role": "user", "content": "a b" * 20}]}, 400, "messages", "shorten it"),
    (CHAT, {"messages": USER, "prompt": "a"}, 400, "prompt", "unknown field"),
    (CHAT, {"messages": USER, "decausal": {"parts": ["a", 1]}}, 400, "decausal.parts", "/v1/completions"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), REFUSED, ids=lambda value: json.dumps(value)[:50])
def test_a_body_that_is_not_accepted_names_the_field_and_what_is(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    refused(client.post(path, json=body), status, param, says)
    if body.get("stream") is None:
        refused(client.post(path, json={**body, "stream": True}), status, param, says)


RAW: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b'{"prompt": ', "not JSON"),
    (b'{"prompt": "a"', "line 1"),
    (b"[1]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
    (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "digits"),
    (b"[" * 100_000, "recursion"),
    (b'{"prompt": [' + b"[1]," * 2**18 + b"[1]]}", "brackets, and at most 262144"),
    (b'{"prompt": ' + b'{"a":' * 900 + b"1" + b"}" * 901, "must be a string"),
    (b'{"prompt": "\\u0041", "metadata": ' + b"[" * 990 + b"]" * 990 + b"}", "recursion"),
    (b'{"prompt": "a", "temperature": 1e999}', "to 1e+20"),
]


@pytest.mark.parametrize(("raw", "says"), RAW, ids=lambda value: str(value)[:30])
def test_a_body_that_is_no_json_is_refused(client: httpx.Client, raw: bytes, says: str) -> None:
    answer = client.post(TEXT, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    refused(answer, 400, answer.json()["error"]["param"], says)


def test_a_prompt_of_ten_megabytes_is_too_long(client: httpx.Client) -> None:
    refused(client.post(TEXT, json={"prompt": "a " * 5 * 2**20}), 413, None, "longer than 2097152 bytes")
    in_chunks = (b"x" * 2**16 for _ in range(40))
    headers = {"Content-Type": "application/json"}
    refused(client.post(TEXT, content=in_chunks, headers=headers), 413, None, "longer than 2097152 bytes")
    refused(client.post(TEXT, json={"prompt": "ab " * 2**18}), 400, "prompt", "shorten it")


def test_paths_methods_and_media_types_that_are_not_there(client: httpx.Client) -> None:
    refused(client.get("/v1/completion"), 404, None, "did you mean '/v1/completions'")
    refused(client.get("/v1/models/none"), 404, "model", "tiny")
    refused(client.get(TEXT), 405, None, "use POST")
    refused(client.delete("/health"), 405, None, "use GET")
    refused(client.post(TEXT, content=b"{}", headers={"Content-Type": "text/plain"}), 415, None, "application/json")
    refused(client.post(TEXT, data={"prompt": "a"}), 415, None, "application/json")


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_what_clients_send_routinely_is_ignored(client: httpx.Client, field: str) -> None:
    answer = client.post(TEXT, json={"prompt": "a", "max_tokens": 2, field: "anything"})
    assert answer.status_code == 200


def test_fields_that_are_not_there_are_accepted_at_their_defaults(client: httpx.Client) -> None:
    defaults = {name: values[0] for name, values in NEUTRAL.items() if values}
    answer = client.post(CHAT, json={"messages": USER, "max_tokens": 2, **defaults, "best_of": None})
    assert answer.status_code == 200, answer.text
    assert client.post(TEXT, json={"prompt": "a", "n": 2, "best_of": 2, "max_tokens": 1}).status_code == 200


def test_bytes_that_are_no_http_do_not_end_the_server(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for junk in (b"\x00\xff" * 100, b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(junk)


def test_the_key_is_asked_for_and_compared(model: Converted) -> None:
    with running([model], api_key="secret") as server, server.client() as client:
        body = {"prompt": "a", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "é"}):
            encoded = {name: value.encode("utf-8") for name, value in headers.items()}
            refused(client.post(TEXT, json=body, headers=encoded), 401, None, "API key")
        refused(client.get("/v1/models"), 401)
        assert client.post(TEXT, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="bad", max_retries=0) as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()
