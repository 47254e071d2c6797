"""Block models and autoregressive ones after the same server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from decausal.errors import UserError
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling.engines import engine_for
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.serving.metrics import Metrics
from decausal.serving.server import models_of
from decausal.serving.settings import ServeSettings
from tests.families import FAMILIES, tiny_tokenizer
from tests.gated_models import FACTS as GATED
from tests.hangs import PATIENCE
from tests.serving.running import Running, converted, running

PROMPTS = ["def area(width, height):", "import", "x = [1, 2", "for i in"]


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted(layout="block", block_size=4, shift=0)


@pytest.fixture(scope="module")
def server(model: Converted) -> Iterator[Running]:
    with running([model], max_rows=3) as found:
        yield found


def test_concurrent_clients_get_what_generate_writes_with_their_seed(model: Converted, server: Running) -> None:
    settings: list[dict[str, Any]] = [
        {"num_steps": 2},
        {"threshold": 0.5},
        {"num_steps": 3, "temperature": 1.0},
        {"speculative": True, "draft": "quadratic"},
        {"speculative": True, "draft": "quadratic", "temperature": 1.0, "top_p": 0.9},
    ]

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        def ask(index: int) -> tuple[str, str]:
            options = {"prompt": PROMPTS[index % 4], "max_tokens": 3 + index, "seed": index}
            body = {"model": "tiny", "extra_body": settings[index % 5], **options}
            whole = client.completions.create(**body).choices[0].text
            streamed = client.completions.create(**body, stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in streamed)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(12)))
    for index, (whole, streamed) in enumerate(answers):
        wanted = generate(model, PROMPTS[index % 4], max_new_tokens=3 + index, seed=index, **settings[index % 5])
        assert whole == streamed == wanted.text


@pytest.mark.parametrize(
    "decoding", [{"num_steps": 4}, {"speculative": True, "draft": "quadratic"}], ids=["denoised", "speculated"]
)
def test_events_log_probabilities_and_stop_are_there_too(
    model: Converted, server: Running, decoding: dict[str, Any]
) -> None:
    plain = generate(model, PROMPTS[2], max_new_tokens=16, **decoding)
    stop = plain.text[4:6]
    body = {"prompt": PROMPTS[2], "max_tokens": 16, "seed": 0, **decoding}
    with server.client() as client:
        found = client.post("/v1/completions", json={**body, "logprobs": 2, "stop": stop}).json()["choices"][0]
        assert found["text"] == plain.text.partition(stop)[0]
        assert found["finish_reason"] == "stop"
        assert len(found["logprobs"]["tokens"]) == len(found["decausal"]["step_of_token"])
        watched = client.post("/v1/completions", json={**body, "stream": True, "decausal": {"events": True}}).text
        assert watched.count('"confidence":[') == plain.num_forwards
        assert '"confidence":[null,null,null,null' not in watched


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"suffix": "\n"}, "suffix needs layout"),
        ({"remask": True}, "remask is not possible"),
        ({"speculative": True, "window": 3}, "window does nothing"),
        ({"first_token_from_clean": True}, "first_token_from_clean is not possible under layout 'block' with shift 0"),
        ({"first_token_from_clean": "yes"}, "first_token_from_clean' should be a valid boolean"),
    ],
)
def test_what_block_models_cannot_do_is_an_error_even_of_a_stream(
    server: Running, wrong: dict[str, Any], says: str
) -> None:
    for stream in (False, True):
        body = {"prompt": "import", "max_tokens": 4, "stream": stream, **wrong}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"speculative": False}, "masks draft for verified decoding alone"),
        ({"draft_length": 5}, "more than this model has learnt to draft"),
    ],
)
def test_a_model_that_only_drafts_is_asked_for_nothing_else(wrong: dict[str, Any], says: str) -> None:
    model = converted(**GATED)
    with running([model]) as server:
        body = {"prompt": "x = [1, 2", "max_tokens": 9}
        found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]["text"]
        assert found == generate(model, body["prompt"], max_new_tokens=9).text
        for stream in (False, True):
            refused = httpx.post(
                f"{server.url}/v1/completions", json={**body, "stream": stream, **wrong}, timeout=PATIENCE
            )
            assert refused.status_code == 400
            assert says in refused.json()["error"]["message"]
    engine = engine_for(model, max_rows=1, max_length=32)
    row = Row((model.tokenizer("x")["input_ids"], []), (4,), "the prompt")
    with pytest.raises(UserError, match=says):
        engine.submit(Job(row, SamplerSettings(speculative=True).updated(**wrong), 0, ()))


def test_the_source_is_served_beside_the_model_and_writes_what_it_always_wrote(tmp_path: Path) -> None:
    source, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    source.get_output_embeddings().weight.data *= 4
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    model = converted(chat=False, source=str(tmp_path / "source"))
    save_converted(tmp_path / "converted", *model)
    models = models_of(tmp_path / "converted", ServeSettings(), Metrics(), with_source=True)
    assert [found.name for found in models] == ["converted", "converted-source"]
    ids = tokenizer("x = [1, 2", return_tensors="pt")
    wanted = source.generate(**ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    with running([models[0].converted, models[1].converted], is_source=(False, True)) as server:
        body = {"model": "tiny-2", "prompt": "x = [1, 2", "max_tokens": 9}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()
        assert answer["choices"][0]["text"] == tokenizer.decode(wanted[0, ids["input_ids"].shape[1] :])
        assert answer["decausal"]["num_forwards"] == 9
        refused = httpx.post(f"{server.url}/v1/completions", json=body | {"speculative": True}, timeout=PATIENCE)
        assert refused.status_code == 400
        assert "'causal' has learnt none" in refused.json()["error"]["message"]
