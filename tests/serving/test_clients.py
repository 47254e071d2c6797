"""What clients of other servers send and expect."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import pytest
import torch
from tokenizers import AddedToken

from decausal.diffusion.layout import Layout
from decausal.evaluation.passes import measuring, token_nll
from decausal.models.backbone import head_of
from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
from decausal.serving import responses
from decausal.serving.rendering import conversation_text
from decausal.serving.schema import ChatBody
from tests.hangs import PATIENCE
from tests.serving.running import Running, converted, running

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@pytest.fixture(scope="module")
def server(model: Converted) -> Iterator[Running]:
    with running([model, converted(layout="causal")], is_source=(False, True), max_rows=4) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def answered(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("is_text", [False, True])
def test_a_stop_token_ends_the_text_before_it(model: Converted, is_text: bool) -> None:
    options = {"max_new_tokens": 16, "temperature": 2.0, "seed": 3}
    whole = generate(model, "x = [1", **options)
    number = next(i for i in range(5, 16) if whole.ids[i] not in whole.ids[:i])
    tokenizer, stop = deepcopy(model.tokenizer), {"stop_token_ids": [whole.ids[number]]}
    if is_text:  # of a special token, which decoding leaves out
        name = tokenizer.convert_ids_to_tokens(whole.ids[number])
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(name, special=True)]})
        stop = {"stop": name}
    served = Converted(model.model, tokenizer, model.facts)
    body = {"prompt": "x = [1", "max_tokens": 16, "temperature": 2.0, "seed": 3, "logprobs": 0, **stop}
    with running([served]) as server, server.client() as client:
        (choice,) = answered(client, TEXT, **body)["choices"]
        pieces = client.post(TEXT, json={**body, "stream": True}).text
        refused = client.post(TEXT, json={"prompt": "a", "stop_token_ids": [10**9]})
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == number
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == tokenizer.decode(whole.ids[:number])
    assert '"finish_reason":"stop"' in pieces
    assert (refused.status_code, "vocabulary" in refused.text) == (400, True)


def test_min_p_is_a_field(model: Converted, client: httpx.Client) -> None:
    asked = {"temperature": 50.0, "seed": 1}
    found = answered(client, TEXT, prompt="x", max_tokens=8, min_p=1.0, **asked)["choices"][0]["text"]
    assert found == generate(model, "x", max_new_tokens=8, min_p=1.0, **asked).text
    assert found == generate(model, "x", max_new_tokens=8, temperature=0).text


def test_events_hold_whole_characters_and_given_text_as_it_was_given(model: Converted, client: httpx.Client) -> None:
    parts = ["مرحبا ", 4, " طويل ", 3, " סוף"]
    body = {"decausal": {"parts": parts, "events": True}, "num_steps": 7, "seed": 1, "stream": True}
    text, drafts = "", []
    with client.stream("POST", TEXT, json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["text"]
                drafts.append(chunk["decausal"])
    assert len(drafts) == 7
    for reported in drafts:
        given = "".join(
            piece for piece, is_given in zip(reported["draft"], reported["is_given"], strict=True) if is_given
        )
        assert given.strip() == "طويل"
    assert "".join(drafts[-1]["draft"]) == text


def test_log_probs_hold_the_bytes_of_tokens_inside_of_characters(model: Converted, client: httpx.Client) -> None:
    options = {"max_tokens": 24, "temperature": 5.0, "seed": 2}
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3, **options}
    (choice,) = answered(client, CHAT, **chat)["choices"]
    reported = choice["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in reported)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    assert any(token["token"].startswith("bytes:\\x") and len(token["bytes"]) == 1 for token in reported)
    assert all(len({other["token"] for other in token["top_logprobs"]}) == 3 for token in reported)

    (choice,) = answered(client, TEXT, prompt="x", logprobs=2, **options)["choices"]
    reported, text = choice["logprobs"], choice["text"]
    assert all(len(top) == 2 for top in reported["top_logprobs"])
    for token, offset in zip(reported["tokens"], reported["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset : offset + len(token)] == token
    streamed = client.post(TEXT, json={"prompt": "x", "logprobs": 2, "stream": True, **options}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed.splitlines() if line.startswith("data: {")]
    for name in ("tokens", "text_offset"):
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == reported[name]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**62, 2**64 - 1, 10**300])
def test_any_integer_is_a_seed_and_the_one_reported_gives_the_answer_again(client: httpx.Client, seed: int) -> None:
    asked = {"prompt": "x", "max_tokens": 6, "temperature": 2.0}
    first, again = (answered(client, TEXT, **asked, n=2, seed=seed)["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    reported = first[1]["decausal"]["seed"]
    assert answered(client, TEXT, **asked, seed=reported)["choices"][0]["text"] == first[1]["text"]


def test_a_turn_without_content_and_a_tools_answer_reach_the_template(model: Converted) -> None:
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% for c in m.tool_calls or [] %} {{ c.function.name }}"
        "({{ c.function.arguments.city }}){% endfor %}: {{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant: {% endif %}{% if be_short %}short {% endif %}"
    )
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    reported = "[user: weather?][assistant w(Oslo): ][tool: rain]"

    def text(**body: Any) -> str:
        return conversation_text(ChatBody.model_validate({"messages": messages, **body}), tokenizer)

    assert text() == reported + "[assistant: "
    assert text(chat_template_kwargs={"be_short": True}) == reported + "[assistant: short "
    assert text(add_generation_prompt=False) == reported
    messages[2] = {"role": "assistant", "content": "It rains"}
    assert text(continue_final_message=True).endswith("[assistant: It rains")
    del messages[1]["content"]
    assert "w(Oslo): ]" in text()


def test_tools_reach_the_template_as_they_were_given(model: Converted) -> None:
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t | tojson }};{% endfor %}{{ messages[0].content }}"
    tool = {"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}

    def text(**body: Any) -> str:
        messages = [{"role": "user", "content": "weather?"}]
        return conversation_text(ChatBody.model_validate({"messages": messages, **body}), tokenizer)

    assert text(tools=[tool], tool_choice="auto") == f"{json.dumps(tool)};weather?"
    assert text(tools=[]) == text(tools=None) == text() == "weather?"


def test_an_open_answer_is_continued(model: Converted, client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "He"}]
    asked = {"max_tokens": 6, "seed": 1, "continue_final_message": True}
    found = answered(client, CHAT, messages=messages, **asked)["choices"][0]["message"]["content"]
    start = model.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert start.endswith("assistant\nHe")
    assert found == answered(client, TEXT, prompt=start, max_tokens=6, seed=1)["choices"][0]["text"]


def test_values_that_change_nothing_are_taken(client: httpx.Client) -> None:
    neutral = {"repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True}
    asked = {"prompt": "x", "max_tokens": 4, "seed": 1}
    found = answered(client, TEXT, **asked, **neutral, stop_token_ids=[], min_p=0, stop=None)
    assert found["choices"][0]["text"] == answered(client, TEXT, **asked)["choices"][0]["text"]


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/metrics"])
def test_head_is_answered_as_get_without_a_body(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == client.get(path).headers["content-type"]
    assert client.head(TEXT).status_code == 405


@pytest.mark.parametrize("key", ["plain", "schlüssel", "ключ"])
def test_the_key_may_be_of_any_script_and_its_scheme_of_any_case(model: Converted, key: str) -> None:
    with running([model], api_key=key) as server, server.client() as client:

        def status(value: bytes) -> int:
            return client.get("/v1/models", headers=[(b"Authorization", value)]).status_code

        for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
            assert status(scheme + key.encode()) == 200
        if key == "schlüssel":
            assert status(b"Bearer " + key.encode("latin-1")) == 200
        for wrong in (
            b"",
            b"Basic " + key.encode(),
            key.encode(),
            b"Bearer",
            b"Bearer x" + key.encode(),
            b"Bearer \xff",
        ):
            assert status(wrong) == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "a", "model": "m" * 10**6}),
        (TEXT, {"prompt": "a", "x" * 10**6: 1}),
        (TEXT, {"prompt": "a", "temperature": "t" * 10**6}),
        (TEXT, {"prompt": "a", "confidence": "c" * 10**6}),
        (TEXT, {"prompt": "a", "decausal": {"y" * 10**6: 1}}),
        (CHAT, {"messages": [{"role": "r" * 10**6, "content": ""}]}),
        (CHAT, {"messages": [{"role": "user", "content": "c"}], "chat_template_kwargs": {"k" * 10**6: 1}}),
        ("/v1/" + "p" * 3000, {}),
    ],
)
def test_errors_do_not_echo_what_is_long(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 2000
    assert answer.json()["error"]["message"]


def test_answers_may_end_while_the_server_drains_and_what_is_left_ends_with_an_error_event(model: Converted) -> None:
    slow = {"prompt": "x", "max_tokens": 60, "num_steps": 60, "n": 16, "stream": True, "decausal": {"events": True}}
    with running([model], drain=1.0, max_rows=1) as server, server.client() as client:
        engine = server.models[0].worker._engine
        step = engine.step
        engine.step = lambda: time.sleep(0.02) or step()
        with client.stream("POST", TEXT, json=slow) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.stop()
            reported = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert reported[-1]["error"] | {"message": ""} == {
        "message": "",
        "type": "server_error",
        "param": None,
        "code": "shutting_down",
    }
    assert len(reported) > 3, "nothing went on"


def test_a_stream_that_fails_ends_with_an_error_event(model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "chunk", lambda *arguments: 1 / 0)
    with running([model]) as server, server.client() as client:
        answer = client.post(TEXT, json={"prompt": "x", "max_tokens": 4, "stream": True})
        server.wait_until_idle()
    error, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert json.loads(error)["error"]["code"] == "internal_error"
    assert done == "[DONE]"


def test_a_client_that_leaves_inside_of_its_body_is_no_traceback(
    server: Running, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    with caplog.at_level(logging.DEBUG, logger="decausal.serving"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b'{"prompt": "a')
            time.sleep(0.1)
        deadline = time.monotonic() + PATIENCE
        while "the client has left" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "Traceback" not in caplog.text
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_logprobs_scores_the_prompt_under_a_causal_model(
    server: Running, client: httpx.Client, is_stream: bool, max_tokens: int
) -> None:
    source = server.models[1].converted
    text = "x = é [1]"
    ids = source.tokenizer(text)["input_ids"]
    prompts = [text] * 2 if is_stream else [ids] * 2
    body = {"model": "tiny-2", "prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": 2, "n": 2}
    answer = client.post(TEXT, json={**body, "temperature": 0, "seed": 1, "stream": is_stream})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if "{" in line]
    row, places = torch.tensor([ids]), torch.arange(1, len(ids))
    head = head_of(source.model)._replace(banned=source.facts.mask_token_id)
    with measuring(source.model):
        documents = torch.zeros_like(row)
        nll = token_nll(source.model, head, Layout("causal"), row, documents, places, row[0, 1:], shift=1)
    for index in range(4):
        pieces = [c for line in lines for c in json.loads(line)["choices"] if c["index"] == index]
        reported = {name: [v for piece in pieces for v in piece["logprobs"][name]] for name in pieces[0]["logprobs"]}
        assert "".join(piece["text"] for piece in pieces).startswith(text)
        assert len(reported["tokens"]) == len(ids) + max_tokens
        assert (reported["token_logprobs"][0], reported["top_logprobs"][0]) == (None, None)
        assert reported["token_logprobs"][1 : len(ids)] == pytest.approx((-nll).tolist(), abs=1e-4)
        for place in range(1, len(ids)):
            own, best = reported["token_logprobs"][place], max(reported["top_logprobs"][place].values())
            assert own == best or own <= min(reported["top_logprobs"][place].values())
        for token, offset in zip(reported["tokens"], reported["text_offset"], strict=True):
            whole = "".join(piece["text"] for piece in pieces)
            assert token.startswith("bytes:") or whole[offset : offset + len(token)] == token
        assert pieces[-1]["finish_reason"] == "length"


def test_echo_with_logprobs_is_refused_where_a_layout_does_not_say_and_beside_parts(client: httpx.Client) -> None:
    answer = client.post(TEXT, json={"prompt": "x", "max_tokens": 2, "echo": True, "logprobs": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")
    assert "--with_source" in answer.text
    answer = client.post(TEXT, json={"decausal": {"parts": ["x", 2]}, "echo": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")
    only = answered(client, TEXT, prompt="x = ", max_tokens=0, echo=True)
    assert (only["choices"][0]["text"], only["usage"]["completion_tokens"]) == ("x = ", 0)
