"""Likelihood of continuations: a context read once, many views in one pass, and what one at a time would give."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from decausal.diffusion.nelbo import nelbo_exact
from decausal.evaluation.continuations.causal import score_causally
from decausal.evaluation.continuations.greedy import written_greedily
from decausal.evaluation.continuations.nelbo import _patterns, score_by_nelbo
from decausal.evaluation.continuations.scored import Continuation
from decausal.evaluation.patterns import weighted_patterns
from decausal.models.backbone import head_of, logits
from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
from tests.evaluation.rows import converted
from tests.evaluation.test_likelihood import _token_log_probs

LAYOUTS = [
    {"layout": "bidirectional"},
    {"layout": "bidirectional", "shift": 0},
    {"layout": "block", "block_size": 1},
    {"layout": "block", "block_size": 3},
    {"layout": "block", "block_size": 4, "shift": 0},
]
layouts = pytest.mark.parametrize("facts", LAYOUTS, ids=str)


def model(**facts: Any) -> Converted:
    stock, converted_facts, tokenizer = converted(**facts)
    return Converted(stock, tokenizer, converted_facts)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def asked() -> list[Continuation]:
    """Two contexts with several continuations, one with one; lengths from 1 to 6."""
    first, second = random_ids(7, 1), random_ids(5, 2)
    return [
        Continuation(first, random_ids(4, 3)),
        Continuation(second, random_ids(2, 4)),
        Continuation(first, random_ids(6, 5)),
        Continuation(random_ids(9, 6), random_ids(3, 7)),
        Continuation(first, random_ids(1, 8)),
        Continuation(second, random_ids(5, 9)),
    ]


@torch.no_grad()
def causal_log_likelihood(one: Continuation, whole: Converted) -> tuple[float, bool]:
    stock, _, facts = whole
    values = logits(stock, torch.tensor([one.ids]), type(facts.attention)("causal"))[0]
    values[:, facts.mask_token_id] = -math.inf
    predicting = values[len(one.context) - 1 : -1].log_softmax(-1)
    tokens = torch.tensor(one.tokens)
    is_greedy = bool((predicting.argmax(-1) == tokens).all())
    return float(predicting.gather(1, tokens[:, None]).sum()), is_greedy


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gemma2: a window of 4 tokens in every other layer
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_context_read_once_gives_each_continuation_what_it_has_alone(family: str, batch_size: int) -> None:
    whole, requests = model(family=family, layout="block", block_size=1), asked()
    greedy = list(requests[3].context)
    for _ in range(3):  # one that is greedy
        values = logits(whole.model, torch.tensor([greedy]), type(whole.facts.attention)("causal"))[0, -1]
        values[whole.facts.mask_token_id] = -math.inf
        greedy.append(int(values.argmax()))
    requests.append(Continuation(requests[3].context, greedy[-3:]))
    found = {
        index: (score, written) for index, score, written in score_causally(whole, requests, batch_size=batch_size)
    }
    assert sorted(found) == list(range(len(requests)))
    for index, one in enumerate(requests):
        log_likelihood, is_greedy = causal_log_likelihood(one, whole)
        assert found[index][0].log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert found[index][1] == is_greedy
    assert found[len(requests) - 1][1]


def test_an_ar_source_without_a_row_for_the_mask_token_scores_requests_of_any_lengths_together() -> None:
    whole, requests = model(layout="block", block_size=1), asked()
    source = Converted(*whole[:2], replace(whole.facts, mask_token_id=head_of(whole.model).weight.shape[0]))
    found = {index: score for index, score, _ in score_causally(source, requests, batch_size=16)}
    for index, one in enumerate(requests):
        (alone,) = (score for _, score, _ in score_causally(source, [one], batch_size=1))
        assert found[index].log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)


def test_a_context_is_read_once_for_all_its_continuations() -> None:
    whole, requests = model(layout="block", block_size=1), asked()
    read: list[int] = []
    whole.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    list(score_causally(whole, [requests[0], requests[2], requests[4]], batch_size=3))
    assert read == [7 + 3 + 5 + 0]


def exact(one: Continuation, whole: Converted) -> float:
    """By enumeration, one pattern of the whole row at a time."""
    stock, _, facts = whole
    num_fills = -len(one.ids) % (facts.block_size or 1)  # a block is whole at decoding, too
    row = {"clean_ids": torch.tensor([*one.ids, *[facts.mask_token_id] * num_fills])}
    place = torch.arange(len(row["clean_ids"]))
    is_maskable = (place >= len(one.context)) & (place < len(one.ids))
    return -nelbo_exact(_token_log_probs(stock, facts, row), is_maskable, facts.block_size)


@layouts
@pytest.mark.parametrize("batch_size", [1, 4])
def test_with_all_patterns_the_bound_is_the_nelbo_by_enumeration(facts: dict[str, Any], batch_size: int) -> None:
    whole, requests = model(**facts), asked()
    found = dict(score_by_nelbo(whole, requests, num_samples=63, batch_size=batch_size))
    assert sorted(found) == list(range(len(requests)))
    for index, one in enumerate(requests):
        assert found[index].log_likelihood == pytest.approx(exact(one, whole), abs=1e-4)
        assert found[index].standard_error == 0


@pytest.mark.parametrize("facts", [LAYOUTS[0], {"layout": "block", "block_size": 8, "shift": 0}], ids=str)
def test_estimates_lie_around_the_nelbo_as_far_as_their_standard_error_says(facts: dict[str, Any]) -> None:
    whole, one = model(**facts), asked()[2]
    truth = exact(one, whole)
    found = [dict(score_by_nelbo(whole, [one], num_samples=4, batch_size=1, seed=seed))[0] for seed in range(100)]
    errors = torch.tensor([score.log_likelihood - truth for score in found], dtype=torch.float64)
    assert errors.std() > 0.01
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(len(errors))
    reported = torch.tensor([score.standard_error for score in found], dtype=torch.float64).square().mean().sqrt()
    assert 0.7 * errors.std() < reported < 3 * errors.std()  # stratified draws spread less than they tell


def test_masks_are_those_of_the_request_whatever_is_asked_beside_it() -> None:
    whole, requests = model(layout="bidirectional"), asked()
    together = dict(score_by_nelbo(whole, requests, num_samples=4, batch_size=6))
    for index, one in enumerate(requests):
        alone = dict(score_by_nelbo(whole, [one], num_samples=4, batch_size=1))[0]
        assert together[index] == pytest.approx(alone, abs=1e-4)


def test_long_requests_are_read_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, requests = model(layout="block", block_size=4), asked()
    in_one = dict(score_by_nelbo(whole, requests, num_samples=15, batch_size=6))
    monkeypatch.setattr("decausal.evaluation.continuations.nelbo.LONGEST_PASS", 40)
    in_several = dict(score_by_nelbo(whole, requests, num_samples=15, batch_size=6))
    for index in in_one:
        assert in_several[index] == pytest.approx(in_one[index], abs=1e-4)


def test_views_share_the_clean_tokens_of_their_row() -> None:
    whole, one = model(layout="block", block_size=4, shift=0), Continuation(random_ids(24, 1), random_ids(4, 2))
    read: list[int] = []
    whole.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    list(score_by_nelbo(whole, [one], num_samples=15, batch_size=1))
    assert read == [28 + 15 * 4]  # one forward per view would read 15 * (28 + 4)


def test_a_block_is_read_once_for_all_views_that_mask_the_same_of_it() -> None:
    whole, one = model(layout="block", block_size=4, shift=0), Continuation(random_ids(8, 1), random_ids(8, 2))
    read: list[int] = []
    whole.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    list(score_by_nelbo(whole, [one], num_samples=14, batch_size=1))
    assert len(read) == 1
    num_copies = (read[0] - 16) // 4
    masks = _patterns(one, whole.facts, 14, 0).is_masked
    assert num_copies == sum(len(set(map(tuple, masks[:, start : start + 4].tolist()))) for start in (8, 12)) < 28


def test_requests_of_unlike_lengths_are_read_without_padding() -> None:
    whole = model(layout="block", block_size=4, shift=0)
    requests = [Continuation(random_ids(12, n), random_ids(4, n + 9)) for n in range(8)]
    requests += [Continuation(random_ids(4, 20), random_ids(12, 21))]
    read: list[int] = []
    whole.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    list(score_by_nelbo(whole, requests, num_samples=15, batch_size=9))
    assert read == [pytest.approx(9 * 16 + (8 + 3) * 15 * 4, rel=0.15)]


@pytest.mark.parametrize("num_samples", [1, 3, 7, 8, 31])
def test_weights_of_patterns_make_every_loss_count_once(num_samples: int) -> None:
    unit_ids = torch.tensor([-1, -1, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, -1])
    mean = torch.zeros(len(unit_ids), dtype=torch.float64)
    for position in range(200):
        patterns = weighted_patterns(unit_ids, num_samples, seed=0, position=position)
        assert not patterns.is_masked[:, unit_ids < 0].any()
        mean += patterns.weight.mean(0) / 200
    # With equal losses a unit's NELBO is its number of tokens: each has weight 1 on average.
    assert mean[unit_ids >= 0] == pytest.approx(torch.ones(10).double(), abs=0.35 if num_samples < 31 else 1e-9)
    assert patterns.is_exact.tolist() == [
        unit >= 0 and 2 ** int((unit_ids == unit).sum()) - 1 <= num_samples for unit in unit_ids.tolist()
    ]


@pytest.mark.parametrize(
    "facts", [*LAYOUTS, {"layout": "block", "block_size": 4, "shift": 0, "causal_context": True}], ids=str
)
def test_greedy_is_what_the_sampler_writes_one_token_at_a_time(facts: dict[str, Any]) -> None:
    whole = model(**facts)
    whole.model.generation_config.eos_token_id = None
    whole.tokenizer.eos_token = None
    steps = facts.get("block_size") or 6
    text = "the rain in"
    context = whole.tokenizer(text)["input_ids"]
    length = 6 if facts["layout"] == "bidirectional" else 6 + -(len(context) + 6) % steps  # whole blocks
    new = generate(whole, text, max_new_tokens=length, num_steps=steps).ids
    other = [*new[:-1], (new[-1] + 1) % 250]
    requests = [Continuation(context, new), Continuation(context, other), Continuation(context, random_ids(length, 3))]
    found = dict(written_greedily(whole, requests, batch_size=3))
    assert found == {0: True, 1: False, 2: False}


def test_the_head_reads_what_it_predicts_with_the_mask_token_left_out() -> None:
    whole, requests = model(layout="block", block_size=1), asked()
    before = [score.log_likelihood for _, score, _ in score_causally(whole, requests, batch_size=8)]
    head = head_of(whole.model).weight
    with torch.no_grad():
        head[whole.facts.mask_token_id] = 100 * head[0]
    after = [score.log_likelihood for _, score, _ in score_causally(whole, requests, batch_size=8)]
    assert after == pytest.approx(before, abs=1e-5)
