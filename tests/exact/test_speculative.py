"""Identity 12: self-speculative decoding writes the causal model's own text, whatever its drafts are worth."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from decausal.models.backbone import head_of, logits
from decausal.models.facts import ConversionFacts
from decausal.objectives import head as output_head
from decausal.sampling.blocks import speculative_rows
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.drawing import above, truncate
from decausal.sampling.settings import DRAFTS, SamplerSettings
from tests.exact.speculation import CAUSAL, MASK, engine_of, facts, greedy, job_of, model_of, own, prompt_of, written
from tests.families import FAMILIES, VOCAB_SIZE
from tests.sampling.block_decoding import whole_row_states

KINDS = ("qwen3", "llama", "gemma3", "mistral", "gpt2", "gpt_neox")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_text_is_the_causal_models(family, shift, draft):
    model = model_of(family)
    jobs = [job_of(prompt_of(n, seed=n), own(new, draft, 3)) for n, new in ((1, 11), (9, 7), (4, 1))]
    for job, row in zip(jobs, written(engine_of(model, facts(shift), 2), jobs), strict=True):
        assert row.ids == greedy(model, *job.row.given[:1], *job.row.gaps)
        assert row.reason == "length"


@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    counts=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    shift=st.integers(0, 1),
    drafts=st.lists(st.tuples(st.sampled_from(DRAFTS), st.integers(0, 5)), min_size=5, max_size=5),
    max_rows=st.integers(1, 5),
    end=st.integers(5, VOCAB_SIZE - 1),
    most_read=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_greedy_text_ends_where_the_causal_models_does(lengths, counts, shift, drafts, max_rows, end, most_read):
    """Whatever the rows of a batch draft, and in however many passes their prompts are read."""
    model = model_of("qwen3")
    jobs = [
        job_of(prompt_of(length, seed=index), own(count, *draft), ends=[end])
        for index, (length, count, draft) in enumerate(zip(lengths, counts, drafts, strict=False))
    ]
    engine = engine_of(model, facts(shift, block_size=None), max_rows)
    engine._most_read = most_read
    found = written(engine, jobs)
    for job, row in zip(jobs, found, strict=True):
        expected = greedy(model, *job.row.given[:1], *job.row.gaps, ends=[end])
        assert row.ids == expected
        assert row.reason == ("end" if expected[-1] == end else "length")
        assert row.step_of_token == sorted(row.step_of_token)
        assert row.num_forwards == row.step_of_token[-1] + 1
        if len(job.row.given[0]) <= most_read and job.settings.draft_length == 0:
            assert row.num_forwards == len(row.ids)


def test_greedy_text_is_that_of_transformers_generate():
    model, prompt = model_of("qwen3"), prompt_of(6, seed=1)
    config = GenerationConfig(do_sample=False, max_new_tokens=12, suppress_tokens=[MASK], pad_token_id=0)
    expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    (row,) = written(engine_of(model, facts(1)), [job_of(prompt, own(12))])
    assert row.ids == expected


def test_a_pass_brings_all_drafts_and_one_token_more_where_all_are_right():
    """A model that reads nothing predicts the same token everywhere, masks included."""
    model = FAMILIES["qwen3"](tie_word_embeddings=False).double().eval()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings.copy_(embeddings[:1].expand_as(embeddings))
    count = 1 + 3 * 5  # the prompt's pass brings one token, every later one m + 1
    for shift, draft_length in product((0, 1), (2, 4)):
        engine = engine_of(model, facts(shift, block_size=None))
        (row,) = written(engine, [job_of([5, 6], own(count, "quadratic", draft_length))])
        assert row.ids == greedy(model, [5, 6], count)
        assert row.num_forwards == 1 + 15 // (draft_length + 1)


DRAWN = [
    {"temperature": 1.0},
    {"temperature": 1.6, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("options", DRAWN, ids=str)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_drawn_text_is_what_a_causal_engine_draws_with_the_same_seed(options, draft, family):
    model, causal = model_of(family), ConversionFacts("random", "causal", 1, MASK)
    prompts = [prompt_of(length, seed=length) for length in (3, 7, 1, 5)]
    for shift, length in ((1, 4), (0, 3)):
        jobs = [job_of(prompt, own(9, draft, length, **options), 11 * place) for place, prompt in enumerate(prompts)]
        plain = [
            job_of(prompt, SamplerSettings(max_new_tokens=9, **options), 11 * i) for i, prompt in enumerate(prompts)
        ]
        wanted = written(BlockEngine(model, causal, max_rows=4), plain)
        found = written(engine_of(model, facts(shift), 3), jobs)
        assert [row.ids for row in found] == [row.ids for row in wanted]


@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_drawn_text_has_the_causal_models_distribution(options):
    """All numbers of a grid, at each of three positions: after every beginning, each token has its exact share."""
    torch.manual_seed(1)
    model = FAMILIES["qwen3"](vocab_size=8, eos_token_id=None, tie_word_embeddings=False).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform, or a drafter that is ignored would not be seen
    num_numbers, prompt, settings = 12, [5, 6, 4], own(3, **options)
    numbers = torch.arange(num_numbers).add(0.5).div(num_numbers)

    def on_the_grid(seed, step, position):
        return numbers[(seed // num_numbers ** (position - len(prompt))) % num_numbers].float()

    engine = engine_of(model, facts(1), max_rows=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative_rows, "uniform_numbers", on_the_grid)
        found = written(engine, [job_of(prompt, settings, seed) for seed in range(num_numbers**3)])
    counts = Counter(tuple(row.ids[:length]) for row in found for length in range(4))
    for before in [ids for ids in counts if len(ids) < 3]:
        values = logits(model, torch.tensor([[*prompt, *before]]), CAUSAL)[:, -1].detach()
        values[:, MASK] = -torch.inf
        tempered = truncate(
            above(values, settings.min_p) / settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        for token, chance in enumerate(tempered.softmax(-1)[0].tolist()):
            assert abs(counts[(*before, token)] / counts[before] - chance) <= 1 / num_numbers
            assert chance > 0 or not counts[(*before, token)]
    num_right = 3 * len(found) - sum(row.num_forwards for row in found)
    assert 30 < num_right < len(found) - 30  # drafts are right and wrong, so that the text after both is tested


def drafted(model, prompt, length, block_size=4, shift=1, **more):
    """What stands after the first token that an engine writes."""
    engine = engine_of(model, facts(shift, block_size, **more))
    engine.submit(job_of(prompt, own(20, draft_length=length)))
    engine.step()
    return engine._rows.ids[0, len(prompt) + 1 :][:length].tolist()


@pytest.mark.parametrize("shift", [0, 1])
def test_drafts_are_those_of_a_block_of_masks_after_the_known_tokens(shift):
    model, size = model_of("qwen3"), 4
    layout = ConversionFacts("random", "block", shift, MASK, block_size=size, causal_context=True)
    prompt = prompt_of(2 * size, seed=4)
    with torch.no_grad():
        states = whole_row_states(model, layout, prompt + [MASK] * size, len(prompt))[len(prompt) + 1 - shift :]
    wanted = output_head.logits(states, head_of(model)._replace(banned=MASK)).argmax(-1).tolist()
    assert drafted(model, prompt, size - 1 + shift, shift=shift) == wanted


def test_a_causal_groups_first_masks_draft_as_a_shorter_group_does():
    model = model_of("llama")
    prompts = [prompt_of(5, seed) for seed in range(8)]
    for shift in (0, 1):
        causal = [[drafted(model, each, n, 6, shift, causal_groups=True) for each in prompts] for n in (2, 5)]
        assert causal[0] == [tokens[:2] for tokens in causal[1]]
        both = [[drafted(model, each, n, None, shift) for each in prompts] for n in (2, 5)]
        assert both[0] != [tokens[:2] for tokens in both[1]]


@pytest.mark.parametrize("options", [{}, *DRAWN[1:3]], ids=str)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masks_as_verifiers_write_what_the_model_does_in_blocks_of_one_token(options, draft, family):
    model = model_of(family)
    single = ConversionFacts("random", "block", 0, MASK, block_size=1)
    prompts = [prompt_of(length, seed=length) for length in (3, 7, 1, 5)]
    plain = [job_of(prompt, SamplerSettings(max_new_tokens=9, **options), 11 * i) for i, prompt in enumerate(prompts)]
    wanted = written(BlockEngine(model, single, max_rows=4), plain)
    jobs = [job_of(prompt, own(9, draft, 3, verifier="masks", **options), 11 * i) for i, prompt in enumerate(prompts)]
    jobs.append(job_of(prompts[1], own(9, "quadratic", 2)))  # rows of both verifiers share passes
    engine = engine_of(model, facts(0), 3)
    engine._most_read = 4
    found = written(engine, jobs)
    assert [row.ids for row in found[:-1]] == [row.ids for row in wanted]
    assert found[-1].ids == greedy(model, prompts[1], 9)
    assert found[-1].ids != written(engine, [job_of(prompts[1], own(9, verifier="masks"))])[0].ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_the_causal_models(temperature):
    model, prompt = model_of("qwen3"), prompt_of(5, seed=3)
    settings = own(9, temperature=temperature)
    engine = engine_of(model, facts(1), 2)
    plain, asking, watched = (
        engine.submit(job_of(prompt, settings, **options))
        for options in ({}, {"num_top_log_probs": 2}, {"is_watched": True})
    )
    reported = {plain: [], asking: [], watched: []}
    while engine.num_running:
        for progress in engine.step():
            reported[progress.ticket].append(progress)
    ids = reported[plain][-1].ended.ids
    assert reported[plain][-1].ended == reported[asking][-1].ended == reported[watched][-1].ended
    assert not any(each.confidence or each.log_probs for each in reported[plain])
    assert not any(each.log_probs for each in reported[watched])
    values = logits(model, torch.tensor([prompt + ids]), CAUSAL)[0, len(prompt) - 1 : -1].detach()
    values[:, MASK] = -torch.inf
    expected = values.log_softmax(-1)
    found = [log_prob for each in reported[asking] for log_prob in each.log_probs]
    for (log_prob, top), spread, token in zip(found, expected, ids, strict=True):
        assert log_prob == pytest.approx(spread[token].item(), abs=1e-5)
        assert [token for token, _ in top] == spread.topk(2).indices.tolist()
    confidence = torch.tensor([sure for each in reported[watched] for sure in each.confidence])
    torch.testing.assert_close(confidence.log(), torch.tensor([log_prob for log_prob, _ in found]))
