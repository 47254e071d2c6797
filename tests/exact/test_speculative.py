"""Identity 12: self-speculative decoding writes the causal model's own text, whatever its drafts are worth."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.backbone import body_forward, head_of, logits
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.objectives import head as output_head
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.blocks.speculative_rows import probabilities
from decausal.sampling.jobs import Job, run
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.families import FAMILIES, VOCAB_SIZE

CAUSAL = Layout("causal")
MASK = 3
KINDS = ("qwen3", "llama", "gemma3", "mistral", "gpt2", "gpt_neox")
_MODELS = {}


def model_of(family):
    """A random model in fp64: its best tokens are far enough apart for any order of summation."""
    if family not in _MODELS:
        _MODELS[family] = FAMILIES[family]().double().eval()
    return _MODELS[family]


def facts(shift, block_size=4):
    return ConversionFacts(source="random", layout="block", block_size=block_size, shift=shift, mask_token_id=MASK)


def job_of(prompt, settings, seed=0, ends=(), **options):
    row = Row((list(prompt), []), (settings.max_new_tokens,), "the prompt")
    return Job(row, settings, seed, tuple(ends), **options)


def engine_of(model, facts, max_rows=16, max_length=64, draft_length=None):
    converted = Converted(model, None, facts)
    return SpeculativeEngine(converted, max_rows=max_rows, max_length=max_length, draft_length=draft_length)


def written(engine, jobs):
    """How each of some jobs ended."""
    ended = dict(run(engine, jobs))
    return [ended[index] for index in range(len(jobs))]


def greedy(model, prompt, max_new_tokens, ends=()):
    """The causal model's greedy text, one whole forward per token."""
    ids = list(prompt)
    head = head_of(model)._replace(banned=MASK)
    with torch.no_grad():
        while len(ids) < len(prompt) + max_new_tokens:
            state = body_forward(model, torch.tensor([ids]), CAUSAL).last_hidden_state[:, -1]
            ids.append(int(output_head.logits(state, head).argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def prompt_of(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("shift", [0, 1])
def test_greedy_text_is_the_causal_models(family, shift):
    model = model_of(family)
    jobs = [job_of(prompt_of(n, seed=n), SamplerSettings(max_new_tokens=new)) for n, new in ((1, 11), (9, 7), (4, 1))]
    for job, row in zip(jobs, written(engine_of(model, facts(shift), 2, draft_length=3), jobs), strict=True):
        assert row.ids == greedy(model, *job.row.given[:1], *job.row.gaps)
        assert row.reason == "length"


@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    counts=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    shift=st.integers(0, 1),
    draft_length=st.integers(1, 5),
    max_rows=st.integers(1, 5),
    end=st.integers(5, VOCAB_SIZE - 1),
)
@settings(max_examples=15, deadline=None)
def test_greedy_text_ends_where_the_causal_models_does(lengths, counts, shift, draft_length, max_rows, end):
    model = model_of("qwen3")
    jobs = [
        job_of(prompt_of(length, seed=index), SamplerSettings(max_new_tokens=count), ends=[end])
        for index, (length, count) in enumerate(zip(lengths, counts, strict=False))
    ]
    found = written(engine_of(model, facts(shift), max_rows, draft_length=draft_length), jobs)
    for job, row in zip(jobs, found, strict=True):
        expected = greedy(model, *job.row.given[:1], *job.row.gaps, ends=[end])
        assert row.ids == expected
        assert row.reason == ("end" if expected[-1] == end else "length")
        assert row.step_of_token == sorted(row.step_of_token)
        assert row.num_forwards == row.step_of_token[-1] + 1


def test_greedy_text_is_that_of_transformers_generate():
    model, prompt = model_of("qwen3"), prompt_of(6, seed=1)
    config = GenerationConfig(do_sample=False, max_new_tokens=12, suppress_tokens=[MASK], pad_token_id=0)
    expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    (row,) = written(engine_of(model, facts(1)), [job_of(prompt, SamplerSettings(max_new_tokens=12))])
    assert row.ids == expected


def test_a_pass_brings_all_drafts_and_one_token_more_where_all_are_right():
    """A model that reads nothing predicts the same token everywhere, masks included."""
    model = FAMILIES["qwen3"](tie_word_embeddings=False).double().eval()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings.copy_(embeddings[:1].expand_as(embeddings))
    count = 1 + 3 * 5  # the prompt's pass brings one token, every later one m + 1
    for shift, draft_length in product((0, 1), (2, 4)):
        engine = engine_of(model, facts(shift), draft_length=draft_length)
        (row,) = written(engine, [job_of([5, 6], SamplerSettings(max_new_tokens=count))])
        assert row.ids == greedy(model, [5, 6], count)
        assert row.num_forwards == 1 + 15 // (draft_length + 1)


@pytest.mark.parametrize(
    ("shift", "options"),
    [(1, {"temperature": 1.0}), (0, {"temperature": 1.6, "top_k": 5}), (1, {"temperature": 1.3, "top_p": 0.8})],
)
def test_sampled_text_has_the_causal_models_distribution(shift, options):
    """Pearson's chi-square of three sampled tokens against their exact probabilities, at a chance of 1 in 10,000."""
    torch.manual_seed(1)
    model = FAMILIES["qwen3"](vocab_size=8, eos_token_id=None, tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform, or a drafter that is ignored would not be seen
    num_rows, prompt = 6000, [5, 6, 4]
    own = SamplerSettings(max_new_tokens=3, **options)
    engine = engine_of(model, facts(shift), max_rows=1000, draft_length=2)
    found = written(engine, [job_of(prompt, own, seed) for seed in range(num_rows)])
    counts = Counter(tuple(row.ids) for row in found)
    expected = {ids: num_rows * chance for ids, chance in exact_distribution(model, prompt, own).items()}
    assert counts.keys() <= expected.keys()
    common = [ids for ids, mean in expected.items() if mean >= 5]
    rare = num_rows - sum(expected[ids] for ids in common), num_rows - sum(counts[ids] for ids in common)
    statistic = sum((counts[ids] - expected[ids]) ** 2 / expected[ids] for ids in common)
    statistic += (rare[1] - rare[0]) ** 2 / max(rare[0], 1.0)
    freedom = len(common)
    assert freedom >= 8
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty
    num_right = 3 * num_rows - sum(row.num_forwards for row in found)
    assert num_right > 100  # right drafts occur, so that their verification is tested too


def exact_distribution(model, prompt, own):
    chances = {(): 1.0}
    for _ in range(own.max_new_tokens):
        longer = {}
        rows = torch.tensor([[*prompt, *ids] for ids in chances])
        values = logits(model, rows, CAUSAL)[:, -1].detach()
        values[:, MASK] = -torch.inf
        spread = probabilities(values, RowSettings.of([own] * len(rows), values.device))
        for (ids, chance), row in zip(chances.items(), spread.tolist(), strict=True):
            longer |= {(*ids, token): chance * share for token, share in enumerate(row) if share > 0}
        chances = longer
    return chances


ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(5, VOCAB_SIZE - 1), min_size=1, max_size=9),
        "count": st.integers(1, 9),
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.sampled_from([None, 5]),
        "seed": st.integers(0, 2**40),
        "enters": st.integers(0, 6),
    }
)


@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    family=st.sampled_from(["llama", "gemma3"]),
    shift=st.integers(0, 1),
    max_rows=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 5), max_size=2),
)
@settings(max_examples=25, deadline=None)
def test_a_row_is_the_same_alone_in_any_batch_and_entered_late(rows, family, shift, max_rows, cancelled):
    model, end = model_of(family), 7
    jobs = [
        job_of(
            row["prompt"],
            SamplerSettings(max_new_tokens=row["count"], temperature=row["temperature"], top_k=row["top_k"]),
            row["seed"],
            [end],
        )
        for row in rows
    ]
    alone = [written(engine_of(model, facts(shift), 1), [job])[0] for job in jobs]
    engine, told, index_of, step = engine_of(model, facts(shift), max_rows), {}, {}, 0
    while len(index_of) < len(jobs) or engine.num_running:
        index_of |= {engine.submit(jobs[index]): index for index, row in enumerate(rows) if row["enters"] == step}
        for progress in engine.step():
            told.setdefault(index_of[progress.ticket], []).append(progress)
        step += 1
        if step == 4:  # some have ended, some run, some wait
            for ticket, index in index_of.items():
                if index in cancelled and not (index in told and told[index][-1].ended):
                    engine.cancel(ticket)
                    told.pop(index, None)
    assert not engine.num_waiting
    for index, progress in told.items():
        assert progress[-1].ended == alone[index]
        assert [token for each in progress for token in each.ids] == alone[index].ids
        assert [each.step for each in progress] == list(range(alone[index].num_forwards))
        start = len(rows[index]["prompt"])
        positions = [position for each in progress for position in each.positions]
        assert positions == list(range(start, start + len(positions)))
    assert {index for index in range(len(jobs)) if index not in told} <= cancelled


def test_rows_that_keep_coming_do_not_hold_up_the_others():
    engine = engine_of(model_of("qwen3"), facts(1), max_rows=2)
    count, num_passes = 12, 0
    ticket = engine.submit(job_of([5, 6], SamplerSettings(max_new_tokens=count)))
    is_over = False
    while not is_over:
        engine.submit(job_of([7], SamplerSettings(max_new_tokens=1)))  # over with the pass that reads its prompt
        is_over = any(progress.ticket == ticket and progress.ended for progress in engine.step())
        num_passes += 1
        assert num_passes <= 2 * count


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_the_causal_models(temperature):
    model, prompt = model_of("qwen3"), prompt_of(5, seed=3)
    own = SamplerSettings(max_new_tokens=9, temperature=temperature)
    engine = engine_of(model, facts(1), 2)
    plain, asking, watched = (
        engine.submit(job_of(prompt, own, **options))
        for options in ({}, {"num_top_log_probs": 2}, {"is_watched": True})
    )
    told = {plain: [], asking: [], watched: []}
    while engine.num_running:
        for progress in engine.step():
            told[progress.ticket].append(progress)
    ids = told[plain][-1].ended.ids
    assert told[plain][-1].ended == told[asking][-1].ended == told[watched][-1].ended
    assert not any(each.confidence or each.log_probs for each in told[plain])
    assert not any(each.log_probs for each in told[watched])
    values = logits(model, torch.tensor([prompt + ids]), CAUSAL)[0, len(prompt) - 1 : -1].detach()
    values[:, MASK] = -torch.inf
    expected = values.log_softmax(-1)
    found = [log_prob for each in told[asking] for log_prob in each.log_probs]
    for (log_prob, top), spread, token in zip(found, expected, ids, strict=True):
        assert log_prob == pytest.approx(spread[token].item(), abs=1e-5)
        assert [token for token, _ in top] == spread.topk(2).indices.tolist()
    confidence = torch.tensor([sure for each in told[watched] for sure in each.confidence])
    torch.testing.assert_close(confidence.log(), torch.tensor([log_prob for log_prob, _ in found]))


def test_what_cannot_be_speculated_is_refused():
    model, own = model_of("qwen3"), SamplerSettings(max_new_tokens=2)
    engine = functools.partial(engine_of, model, max_length=8)
    for job, says in [
        (job_of([], own), "empty"),
        (job_of([5] * 7, own), "at most 8"),
        (Job(Row(([5], [6]), (2,), "the text"), own, 0), "after a gap"),
    ]:
        with pytest.raises(UserError, match=says):
            engine(facts(1)).submit(job)
    with pytest.raises(UserError, match="draft_length=0"):
        engine(facts(1), draft_length=0)
    with pytest.raises(UserError, match="causal"):
        engine(ConversionFacts(source="random", layout="causal", shift=1, mask_token_id=MASK))
