"""What clients of other servers send and expect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken

from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
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
    with httpx.Client(base_url=server.url, timeout=60) as found:
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
    with running([served]) as server, httpx.Client(base_url=server.url, timeout=60) as client:
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
    for told in drafts:
        given = "".join(piece for piece, is_given in zip(told["draft"], told["is_given"], strict=True) if is_given)
        assert given.strip() == "طويل"
    assert "".join(drafts[-1]["draft"]) == text


def test_log_probs_hold_the_bytes_of_tokens_inside_of_characters(model: Converted, client: httpx.Client) -> None:
    options = {"max_tokens": 24, "temperature": 5.0, "seed": 2}
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3, **options}
    (choice,) = answered(client, CHAT, **chat)["choices"]
    told = choice["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in told)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    assert any(token["token"].startswith("bytes:\\x") and len(token["bytes"]) == 1 for token in told)
    assert all(len({other["token"] for other in token["top_logprobs"]}) == 3 for token in told)

    (choice,) = answered(client, TEXT, prompt="x", logprobs=2, **options)["choices"]
    told, text = choice["logprobs"], choice["text"]
    assert all(len(top) == 2 for top in told["top_logprobs"])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset : offset + len(token)] == token
    streamed = client.post(TEXT, json={"prompt": "x", "logprobs": 2, "stream": True, **options}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed.splitlines() if line.startswith("data: {")]
    for name in ("tokens", "text_offset"):
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == told[name]
