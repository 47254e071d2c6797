"""Rows that come and go become what `generate` and `infill` make of them alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from decausal.errors import UserError
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted
from decausal.sampling.bidirectional.row_engine import RowEngine
from decausal.sampling.engines import engine_for
from decausal.sampling.filling.infilling import infill
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids
from decausal.sampling.texts import prompt_ids, text_after, text_ids
from tests.families import EOS_ID, FAMILIES, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts

PROMPTS = ["def area(width, height):", "import", "x = [1, 2", "for i in", "class A:\n    ", "return"]
SETTINGS = [
    {"num_steps": 4},
    {"threshold": 0.6, "confidence": "margin"},
    {"num_steps": 5, "temperature": 1.0, "top_p": 0.9, "confidence": "entropy"},
    {"num_steps": 5, "temperature": 0.8, "top_k": 20, "remask": True},
    {"entropy_bound": 2.0, "temperature": 1.3},
    {"threshold": 0.2, "remask": True},
    {"num_steps": 5, "order": "random"},
    {"threshold": 0.3, "window": 3, "cache": "dual", "cache_refresh": 2},
    {"num_steps": 4, "guidance": 1.5, "temperature": 0.9},
    {"num_steps": 9, "window": 4, "remask": "remdm", "remask_rate": 0.4},
    {"num_steps": 6, "window": 2, "cache": "prefix", "guidance": 0.5},
]


def converted(family: str = "qwen3", **facts: Any) -> Converted:
    torch.manual_seed(0)
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer)
    model.get_output_embeddings().weight.data *= 4  # sharper: rounding then decides no comparison
    return Converted(model, tokenizer, conversion_facts(mask_token_id, **{"shift": 1, **facts}))


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


def job(model: Converted, prompt: str, seed: int, length: int = 9, suffix: str | None = None, **options: Any) -> Job:
    after = [] if suffix is None else text_ids(model.tokenizer, suffix)
    row = Row((prompt_ids(model, prompt), after), (length,), "the prompt")
    top = options.pop("num_top_log_probs", None)
    ends = () if after else end_token_ids(model)
    return Job(row, SamplerSettings().updated(**options), seed, ends, num_top_log_probs=top)


def mixed(model: Converted, count: int) -> list[tuple[Job, Any]]:
    """Jobs of all settings and several lengths, each with what the text-to-text functions make of it."""
    pairs = []
    for index in range(count):
        prompt, options = PROMPTS[index % len(PROMPTS)], SETTINGS[(index * 4) % len(SETTINGS)]
        length = 3 + index % 7
        if index % 3 == 2:
            wanted = infill(model, prompt, " = b\n", length, seed=index, **options)
            pairs.append((job(model, prompt, index, length, " = b\n", **options), wanted))
        else:
            wanted = generate(model, prompt, max_new_tokens=length, seed=index, **options)
            pairs.append((job(model, prompt, index, length, **options), wanted))
    return pairs


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("shift", [0, 1])
def test_every_row_of_a_changing_batch_is_what_generate_and_infill_make_of_it(family: str, shift: int) -> None:
    model = converted(family, shift=shift)
    pairs = mixed(model, 17)
    engine = engine_for(model, max_rows=4, max_length=64)
    ended = dict(run(engine, [wanted for wanted, _ in pairs]))
    assert len(ended) == len(pairs)
    for index, (_, generation) in enumerate(pairs):
        found = ended[index]
        assert (found.ids, found.step_of_token, found.num_forwards) == (
            generation.ids,
            generation.step_of_token,
            generation.num_forwards,
        )


def test_a_cancelled_row_leaves_its_place_and_changes_no_other(model: Converted) -> None:
    pairs = mixed(model, 12)
    engine = RowEngine(model, max_rows=3, max_length=64)
    tickets = {engine.submit(wanted): index for index, (wanted, _) in enumerate(pairs)}
    chance, ended = random.Random(0), {}
    given_up = {2, 5, 7}
    while engine.num_running or engine.num_waiting:
        for progress in engine.step():
            if progress.ended:
                ended[tickets[progress.ticket]] = progress.ended
        for ticket, index in tickets.items():
            if index in given_up - ended.keys() and chance.random() < 0.5:
                engine.cancel(ticket)
        assert engine.num_running <= 3
    engine.cancel(999)
    assert ended.keys() >= set(range(12)) - given_up
    assert all(found.ids == pairs[index][1].ids for index, found in ended.items())
    assert given_up - ended.keys(), "no row was cancelled before its end"


def test_progress_reported_step_by_step_adds_up_to_the_end(model: Converted) -> None:
    wanted = [pair[0] for pair in mixed(model, 6)]
    engine = RowEngine(model, max_rows=6, max_length=64)
    jobs = {engine.submit(job): job for job in wanted}
    kept: dict[int, dict[int, int]] = {ticket: {} for ticket in jobs}
    steps = dict.fromkeys(jobs, 0)
    while engine.num_running or engine.num_waiting:
        for progress in engine.step():
            row = kept[progress.ticket]
            assert progress.step == steps[progress.ticket]
            steps[progress.ticket] += 1
            assert not row.keys() & set(progress.positions) - set(progress.reopened)
            assert row.keys() >= set(progress.reopened)
            for position in progress.reopened:
                del row[position]
            row.update(zip(progress.positions, progress.ids, strict=True))
            if progress.ended:
                span = [p for s in jobs[progress.ticket].row.spans() for p in s]
                assert [row[p] for p in span[: len(progress.ended.ids)]] == progress.ended.ids
                is_guided = jobs[progress.ticket].settings.guidance > 0
                assert progress.ended.num_forwards == steps[progress.ticket] * (1 + is_guided)


def test_log_probabilities_are_those_of_the_kept_tokens(model: Converted) -> None:
    engine = RowEngine(model, max_rows=2, max_length=64)
    asking = engine.submit(job(model, "import", 0, num_steps=3, num_top_log_probs=4))
    engine.submit(job(model, "for i", 0, num_steps=3))
    while engine.num_running or engine.num_waiting:
        for progress in engine.step():
            if progress.ticket != asking:
                assert not progress.log_probs
                continue
            assert len(progress.log_probs) == len(progress.ids)
            for token, sure, (log_prob, top) in zip(progress.ids, progress.confidence, progress.log_probs, strict=True):
                assert log_prob == pytest.approx(torch.tensor(sure).log().item(), abs=1e-4)
                assert top[0] == (token, log_prob)  # greedy
                assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
                assert len(top) == 4


def test_a_row_ends_at_the_first_end_token_with_nothing_open_before_it(model: Converted) -> None:
    texts = {}
    for seed in range(40):
        wanted = generate(model, "import", max_new_tokens=12, temperature=2.0, num_steps=6, seed=seed)
        texts[seed] = wanted
    jobs = [job(model, "import", seed, 12, temperature=2.0, num_steps=6) for seed in texts]
    ended = dict(run(RowEngine(model, max_rows=8, max_length=64), jobs))
    for seed, wanted in texts.items():
        assert ended[seed].ids == wanted.ids
        assert (ended[seed].reason == "end") == (EOS_ID in wanted.ids)


def test_a_stop_string_ends_the_row_where_it_is_whole(model: Converted) -> None:
    plain = generate(model, "x = [1, 2", max_new_tokens=16, num_steps=16, confidence="margin")
    stop = plain.text[3:5]
    engine = RowEngine(model, max_rows=1, max_length=64)
    asked = job(model, "x = [1, 2", 0, 16, num_steps=16, confidence="margin", stop=[stop])
    (_, ended), *_ = run(engine, [asked])
    before = prompt_ids(model, "x = [1, 2")
    assert ended.reason == "stop"
    assert ended.ids == plain.ids[: len(ended.ids)]
    assert stop in text_after(model.tokenizer, before, ended.ids)
    assert stop not in text_after(model.tokenizer, before, ended.ids[:-1])


def test_rows_that_cannot_be_written_are_refused(model: Converted) -> None:
    engine = RowEngine(model, max_rows=1, max_length=16)
    with pytest.raises(UserError, match="at most 16"):
        engine.submit(job(model, "import", 0, 40))
    with pytest.raises(UserError, match="begins with a gap"):
        engine.submit(Job(Row(([], [1]), (2,), "the prompt"), SamplerSettings(), 0))
    with pytest.raises(UserError, match="speculative is for continuing prompts"):
        engine.submit(job(model, "import", 0, 4, speculative=True))
    assert engine.num_waiting == 0
