"""OpenAI's own client against a running server: what comes back is what `generate` and `infill` write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from decausal.models.checkpoint import Converted
from decausal.sampling.engines import write
from decausal.sampling.filling.infilling import fill, infill
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.texts import text_after
from tests.hangs import PATIENCE
from tests.serving.running import Running, converted, running

PROMPTS = ["def area(width, height):", "import", "x = [1, 2", "for i in"]
SETTINGS: list[dict[str, Any]] = [
    {"num_steps": 4},
    {"threshold": 0.6, "confidence": "margin"},
    {"num_steps": 5, "temperature": 1.0, "top_p": 0.9, "confidence": "entropy"},
    {"steps": 5, "temperature": 0.8, "top_k": 20, "remask": True},
    {"entropy_bound": 2.0},
]


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@pytest.fixture(scope="module")
def server(model: Converted) -> Iterator[Running]:
    with running([model], max_rows=4) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as found:
        yield found


def asked(options: dict[str, Any]) -> dict[str, Any]:
    """Splits settings into fields that OpenAI's client knows, and `extra_body`."""
    own = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
    return {name: value for name, value in options.items() if name not in own} | {"extra_body": own}


def test_concurrent_clients_get_what_generate_writes_with_their_seed(model: Converted, client: openai.OpenAI) -> None:
    wanted = [(PROMPTS[i % 4], SETTINGS[i % 5], 5 + i % 6, 100 + i) for i in range(20)]

    def ask(request: tuple[str, dict[str, Any], int, int]) -> tuple[str, str, float]:
        prompt, options, length, seed = request
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=length, seed=seed, **asked(options))
        streamed = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=length, seed=seed, stream=True, **asked(options)
        )
        text = "".join(chunk.choices[0].text for chunk in streamed)
        return found.choices[0].text, text, found.model_extra["decausal"]["tokens_per_forward"]

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, wanted))
    for (prompt, options, length, seed), (text, streamed, tokens_per_forward) in zip(wanted, answers, strict=True):
        generation = generate(model, prompt, max_new_tokens=length, seed=seed, **options)
        assert text == streamed == generation.text
        assert tokens_per_forward == pytest.approx(generation.tokens_per_forward, abs=1e-4)


def test_a_suffix_makes_a_gap_that_is_filled_as_infill_fills_it(model: Converted, client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="x = ", suffix="\ny = 2", max_tokens=6, seed=4)
    wanted = infill(model, "x = ", "\ny = 2", 6, seed=4)
    assert found.choices[0].text == wanted.text
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == 6


def test_a_prompt_of_ids_before_a_suffix_stays_as_it_was_sent(model: Converted, client: openai.OpenAI) -> None:
    ids = model.tokenizer("x = ", add_special_tokens=False)["input_ids"]
    found = client.completions.create(model="tiny", prompt=ids, suffix="\ny = 2", max_tokens=6, seed=4)
    after = model.tokenizer("\ny = 2", add_special_tokens=False)["input_ids"]
    settings = settings_for(model.facts, seed=4)
    (ended,) = write(model, [Job(Row((ids, after), (6,), "the prompt"), settings, 4)], batch_size=1)
    assert found.choices[0].text == text_after(model.tokenizer, ids, ended.ids)


def test_a_suffix_without_a_length_is_filled_as_infill_finds_it(model: Converted, client: openai.OpenAI) -> None:
    for seed in (0, 4):
        wanted = infill(model, "x = [", "]\ny = 2", None, seed=seed)
        found = client.completions.create(model="tiny", prompt="x = [", suffix="]\ny = 2", seed=seed)
        reported = found.choices[0].model_extra["decausal"]
        assert found.choices[0].text == wanted.text
        assert reported["step_of_token"] == wanted.step_of_token
        assert (reported["lengths"], reported["num_forwards"]) == ([len(wanted.ids)], wanted.num_forwards)
        assert found.usage.completion_tokens == len(wanted.ids)


UNKNOWN = ["x = [", None, "]\ny = ", 2, "\nz = ", None, "\n"]


@pytest.mark.parametrize("search", ["candidates", "grow"])
def test_gaps_of_unknown_length_become_what_fill_makes_of_them_whoever_else_is_answered(
    model: Converted, client: openai.OpenAI, search: str
) -> None:
    def ask(seed: int) -> tuple[Any, str, list[Any]]:
        extension = {"parts": UNKNOWN, "max_gap": 5, "length_search": search, "events": True}
        options = {"model": "tiny", "prompt": None, "seed": seed, "extra_body": {"decausal": extension}}
        whole = client.completions.create(**options, n=2, temperature=0.7)
        chunks = list(client.completions.create(**options, stream=True, temperature=0.7))
        return whole, "".join(chunk.choices[0].text for chunk in chunks), chunks

    def continue_() -> str:
        return client.completions.create(model="tiny", prompt="import", max_tokens=9, seed=1).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(continue_) for _ in range(4)]
        answers = list(pool.map(ask, (0, 5, 11)))
    assert {other.result() for other in others} == {generate(model, "import", max_new_tokens=9, seed=1).text}
    for seed, (whole, streamed, chunks) in zip((0, 5, 11), answers, strict=True):
        wanted = fill(model, [UNKNOWN, UNKNOWN], max_gap=5, length_search=search, seed=seed, temperature=0.7)
        for choice, filling in zip(whole.choices, wanted, strict=True):
            assert "x = [" + choice.text + "\n" == filling.full_text
            reported = choice.model_extra["decausal"]
            assert (reported["lengths"], reported["num_forwards"]) == (filling.lengths, filling.num_forwards)
        assert streamed == whole.choices[0].text
        assert chunks[0].model_extra["decausal"]["step"] == 0
        assert chunks[-1].model_extra["decausal"]["is_given"].count(False) == sum(wanted[0].lengths)


def test_gaps_anywhere_are_filled_together(client: openai.OpenAI) -> None:
    one = client.completions.create(model="tiny", prompt="x = ", suffix="\ny = 2", max_tokens=6, seed=4)
    parts = client.completions.create(
        model="tiny", prompt=None, seed=4, extra_body={"decausal": {"parts": ["x ", "= ", 2, 4, "\ny", " = 2"]}}
    )
    assert parts.choices[0].text == one.choices[0].text
    several = {"decausal": {"parts": ["x = ", 3, "\ny = ", 2, "\n"], "events": True}}
    whole = client.completions.create(model="tiny", prompt=None, seed=4, extra_body=several).choices[0]
    assert "\ny = " in whole.text
    stream = client.completions.create(model="tiny", prompt=None, seed=4, stream=True, extra_body=several)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    last = chunks[-1].model_extra["decausal"]
    assert last["is_given"].count(True) == len(last["draft"]) - 5
    assert "".join(last["draft"]).count("\ny = ") == 1


def test_n_choices_draw_from_consecutive_seeds_as_a_list_of_prompts_does(
    model: Converted, client: openai.OpenAI
) -> None:
    options = {"temperature": 1.5, "num_steps": 4}
    found = client.completions.create(
        model="tiny", prompt=["import", "x = "], n=2, max_tokens=5, seed=9, **asked(options)
    )
    wanted = generate(model, ["import", "import", "x = ", "x = "], max_new_tokens=5, seed=9, **options)
    assert [choice.text for choice in found.choices] == [generation.text for generation in wanted]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in found.choices[:2]}) == 2
    stream = client.completions.create(
        model="tiny", prompt=["import", "x = "], n=2, max_tokens=5, seed=9, stream=True, **asked(options)
    )
    texts = ["", "", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [generation.text for generation in wanted]


def test_without_a_seed_answers_differ_and_the_seed_is_reported(client: openai.OpenAI) -> None:
    seeds = set()
    for _ in range(3):
        found = client.completions.create(model="tiny", prompt="import", max_tokens=3, temperature=1)
        seeds.add(found.choices[0].model_extra["decausal"]["seed"])
    assert len(seeds) == 3


def test_token_ids_are_a_prompt_too(model: Converted, client: openai.OpenAI) -> None:
    ids = model.tokenizer("x = [1, 2")["input_ids"]
    for prompt in (ids, [ids, ids]):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, seed=1)
        assert found.choices[0].text == generate(model, "x = [1, 2", max_new_tokens=5, seed=1).text


def test_a_stop_string_ends_the_text_before_it_streamed_or_not(model: Converted, client: openai.OpenAI) -> None:
    plain = generate(model, PROMPTS[2], max_new_tokens=16, num_steps=16)
    stop = plain.text[4:6]
    options = {"max_tokens": 16, "stop": [stop, "never"], "seed": 0, "extra_body": {"num_steps": 16}}
    found = client.completions.create(model="tiny", prompt=PROMPTS[2], **options)
    assert found.choices[0].text == plain.text.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 16
    stream = client.completions.create(model="tiny", prompt=PROMPTS[2], stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": ["import", "x"], "max_tokens": 4, "seed": 2}
    plain = client.completions.create(**options)
    echoed = client.completions.create(**options, echo=True)
    assert [choice.text for choice in echoed.choices] == [
        prompt + choice.text for prompt, choice in zip(("import", "x"), plain.choices, strict=True)
    ]
    stream = client.completions.create(**options, echo=True, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in echoed.choices]


def test_log_probabilities_have_openais_shapes_and_stream_to_the_same(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": "import", "max_tokens": 6, "seed": 0, "logprobs": 3}
    found = client.completions.create(**options).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs) == 6
    assert all(value <= 0 for value in found.token_logprobs)
    assert all(token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))
    streamed: list[float] = []
    for chunk in client.completions.create(**options, stream=True):
        streamed += chunk.choices[0].logprobs.token_logprobs
    assert streamed == found.token_logprobs
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=4, seed=0, logprobs=True, top_logprobs=2
    )
    reported = chat.choices[0].logprobs.content
    assert len(reported) == 4
    assert all(len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob for token in reported)


def test_chat_goes_through_the_template(model: Converted, client: openai.OpenAI) -> None:
    wanted = generate(model, "hi", chat=True, max_new_tokens=7, seed=5)
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 7, "seed": 5}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    found = client.chat.completions.create(messages=messages, **options)
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted.text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage == found.usage
    longer = [{"role": "system", "content": "s"}, *messages, {"role": "assistant", "content": "b"}, messages[0]]
    assert client.chat.completions.create(messages=longer, **options).usage.prompt_tokens > found.usage.prompt_tokens


def test_events_tell_the_draft_that_the_text_comes_from(client: openai.OpenAI) -> None:
    asked_for = {"decausal": {"events": True}, "num_steps": 6}
    stream = client.completions.create(
        model="tiny", prompt="import", max_tokens=12, seed=1, stream=True, extra_body=asked_for
    )
    drafts, text = [], ""
    for chunk in stream:
        reported = chunk.model_extra["decausal"]
        text += chunk.choices[0].text
        drafts.append(reported["draft"])
        kept = [place for place, piece in enumerate(reported["draft"]) if piece is not None]
        assert [place for place, sure in enumerate(reported["confidence"]) if sure is not None] == kept
        assert set(reported["positions"]) <= set(kept)
        assert not reported["is_revision"]
    assert [len([piece for piece in draft if piece is not None]) for draft in drafts] == [2, 4, 6, 8, 10, 12]
    plain = client.completions.create(model="tiny", prompt="import", max_tokens=12, seed=1, stream=True)
    assert all("decausal" not in chunk.model_extra for chunk in plain)


def test_remasking_streams_its_revisions_and_no_text_before_the_end(client: openai.OpenAI) -> None:
    options = {"decausal": {"events": True}, "num_steps": 8, "remask": True}
    chunks = []
    for seed in range(8):
        stream = client.completions.create(
            model="tiny", prompt="import", max_tokens=16, temperature=1.5, seed=seed, stream=True, extra_body=options
        )
        found = list(stream)
        assert not any(chunk.choices[0].text for chunk in found[:-1])
        assert found[-1].choices[0].text
        chunks += found
    assert any(chunk.model_extra["decausal"]["is_revision"] for chunk in chunks)


def test_a_client_that_leaves_frees_its_rows(server: Running, client: openai.OpenAI) -> None:
    slow: dict[str, Any] = {"max_tokens": 50, "seed": 0, "extra_body": {"num_steps": 50}}
    for _ in range(3):
        stream = client.completions.create(model="tiny", prompt="import", n=8, stream=True, **slow)
        next(iter(stream))
        assert server.num_rows > 4
        stream.close()
        server.wait_until_idle()

    async def leave_early() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
            task = asyncio.create_task(other.completions.create(model="tiny", prompt="import", n=16, **slow))
            while not server.num_rows:
                assert not task.done()
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave_early())
    server.wait_until_idle()
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
    assert 'decausal_cancelled_requests_total{endpoint="/v1/completions"} 4.0' in text


def test_models_are_listed_and_chosen_by_name(server: Running, client: openai.OpenAI) -> None:
    assert [found.id for found in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra["decausal"]["layout"] == "bidirectional"
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'"):
        client.completions.create(model="tinny", prompt="a")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_metrics_count_tokens_and_rows(server: Running, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = {name: value(name) for name in ("decausal_generated_tokens_total", "decausal_prompt_tokens_total")}
    found = client.completions.create(model="tiny", prompt=["import", "x"], n=2, max_tokens=3, seed=0)
    assert value("decausal_generated_tokens_total") - before["decausal_generated_tokens_total"] == 12
    given = value("decausal_prompt_tokens_total") - before["decausal_prompt_tokens_total"]
    assert given == found.usage.prompt_tokens
    server.wait_until_idle()
    assert value("decausal_rows_waiting") == 0
