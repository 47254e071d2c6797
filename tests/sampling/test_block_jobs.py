"""Jobs for block models become what `generate` makes of them, and every step tells what it kept and how sure it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.batch import BatchEngine
from decausal.sampling.engines import engine_for
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job, run
from decausal.sampling.texts import prompt_ids
from tests.sampling.test_row_engine import PROMPTS, converted, job

SETTINGS = [
    {"num_steps": 2},
    {"threshold": 0.6, "confidence": "margin"},
    {"num_steps": 3, "temperature": 1.0, "top_p": 0.9},
    {"entropy_bound": 2.0, "temperature": 1.3},
]


@pytest.fixture(scope="module", params=[0, 1], ids=["shift 0", "shift 1"])
def model(request: pytest.FixtureRequest) -> Converted:
    return converted(layout="block", block_size=4, shift=request.param)


def test_every_row_of_a_changing_batch_is_what_generate_makes_of_it(model: Converted) -> None:
    wanted, jobs = [], []
    for index in range(11):
        prompt, options, length = PROMPTS[index % 6], SETTINGS[index % 4], 3 + index % 8
        wanted.append(generate(model, prompt, max_new_tokens=length, seed=index, **options))
        jobs.append(job(model, prompt, index, length, **options))
    ended = dict(run(engine_for(model, max_rows=3, max_length=64), jobs))
    for index, generation in enumerate(wanted):
        assert (ended[index].ids, ended[index].step_of_token) == (generation.ids, generation.step_of_token)
        assert (ended[index].num_forwards, ended[index].reason) == (generation.num_forwards, generation.finish_reason)


def test_a_stored_rule_for_first_tokens_holds_in_jobs_as_in_generate() -> None:
    model = converted(layout="block", block_size=4, shift=1, sampler={"first_token_from_clean": True, "num_steps": 2})
    texts = [generate(model, prompt, max_new_tokens=13) for prompt in PROMPTS]
    asked = model._replace(facts=replace(model.facts, sampler={}))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert generate(asked, prompt, max_new_tokens=13, num_steps=2, first_token_from_clean=True) == text
        starts = [i for i, block in enumerate(text.block_of_token) if i and block != text.block_of_token[i - 1]]
        for start in starts:
            assert text.step_of_token[start] < min(text.step_of_token[start + 1 : start + 4], default=10**9)
    found = BatchEngine(model, max_rows=2).run(PROMPTS, max_new_tokens=13, seed=0)
    assert [row.text for row in found] == [row.text for row in texts]


def test_watched_rows_tell_of_every_kept_token_how_probable_it_was(model: Converted) -> None:
    engine = engine_for(model, max_rows=3, max_length=64)
    plain = job(model, "import", 0, 10, num_steps=2)
    watched = Job(**{**vars(plain), "is_watched": True})
    asking = Job(**{**vars(plain), "num_top_log_probs": 3})
    tickets = [engine.submit(each) for each in (plain, watched, asking)]
    steps: dict[int, list] = {ticket: [] for ticket in tickets}
    while engine.num_running or engine.num_waiting:
        for progress in engine.step():
            steps[progress.ticket].append(progress)
    ended = [steps[ticket][-1].ended for ticket in tickets]
    assert ended[0] == ended[1] == ended[2]
    for quiet, sure, reported in zip(*steps.values(), strict=True):
        assert quiet.positions == sure.positions == reported.positions
        assert not quiet.confidence
        assert not quiet.log_probs
        assert not sure.log_probs
        assert len(sure.confidence) == len(reported.log_probs) == len(sure.positions)
        for confidence, token, (log_prob, top) in zip(sure.confidence, reported.ids, reported.log_probs, strict=True):
            assert confidence == pytest.approx(torch.tensor(log_prob).exp().item())
            assert top[0] == (token, log_prob)  # greedy
            assert all(first >= second for (_, first), (_, second) in pairwise(top))
    kept = {
        p: token for reported in steps[tickets[0]] for p, token in zip(reported.positions, reported.ids, strict=True)
    }
    assert [kept[position] for position in sorted(kept)][: len(ended[0].ids)] == ended[0].ids


def test_a_causal_model_writes_its_most_probable_tokens_from_left_to_right() -> None:
    model = converted(layout="causal")
    ids = prompt_ids(model, PROMPTS[0])
    greedy = list(ids)
    with torch.no_grad():
        for _ in range(8):
            logits = model.model(torch.tensor([greedy])).logits[0, -1]
            logits[model.facts.mask_token_id] = -torch.inf
            greedy.append(int(logits.argmax()))
    engine = engine_for(model, max_rows=2, max_length=64, is_autoregressive=True)
    ((_, ended),) = run(engine, [job(model, PROMPTS[0], 0, 8)])
    assert ended.ids == greedy[len(ids) :]
    assert ended.num_forwards == 8


def test_what_block_models_cannot_do_is_refused_before_the_first_pass(model: Converted) -> None:
    engine = engine_for(model, max_rows=1, max_length=16)
    for wrong, says in [
        (job(model, "import", 0, 4, suffix="\n"), "after a gap"),
        (job(model, "import", 0, 4, remask=True, num_steps=2), "remask"),
        (job(model, "import", 0, 40), "only 16 fit"),
    ]:
        with pytest.raises(UserError, match=says):
            engine.submit(wrong)
    assert engine.num_running == engine.num_waiting == 0


def test_a_cancelled_row_leaves_its_place(model: Converted) -> None:
    engine = engine_for(model, max_rows=2, max_length=64)
    jobs = [job(model, prompt, 3, 8, num_steps=2) for prompt in PROMPTS[:4]]
    tickets = [engine.submit(each) for each in jobs]
    engine.step()
    for index in (0, 3):
        engine.cancel(tickets[index])
    ended = {}
    while engine.num_running or engine.num_waiting:
        ended |= {progress.ticket: progress.ended for progress in engine.step() if progress.ended}
    assert {tickets.index(ticket) for ticket in ended} == {1, 2}
    for index in (1, 2):
        wanted = generate(model, PROMPTS[index], max_new_tokens=8, seed=3, num_steps=2)
        assert ended[tickets[index]].ids == wanted.ids
