"""Identity 12: self-speculative decoding writes the causal model's own text, whatever its drafts are worth."""

from __future__ import annotations

import dataclasses
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
from decausal.models.checkpoint import ConversionFacts
from decausal.objectives import tokens
from decausal.sampling.blocks.speculative import speculate
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


def greedy(model, prompt, max_new_tokens, ends=()):
    """The causal model's greedy text, one whole forward per token."""
    ids = list(prompt)
    head = head_of(model)._replace(banned=MASK)
    with torch.no_grad():
        while len(ids) < len(prompt) + max_new_tokens:
            state = body_forward(model, torch.tensor([ids]), CAUSAL).last_hidden_state[:, -1]
            ids.append(int(tokens.logits(state, head).argmax()))
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
    prompts = [prompt_of(length, seed=length) for length in (1, 9, 4)]
    wanted = [SamplerSettings(max_new_tokens=count) for count in (11, 7, 1)]
    found = speculate(model, facts(shift), prompts, wanted, [0, 1, 2], draft_length=3, max_rows=2)
    for prompt, own, row in zip(prompts, wanted, found, strict=True):
        assert row.ids == greedy(model, prompt, own.max_new_tokens)
        assert row.finish_reason == "length"


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
    prompts = [prompt_of(length, seed=index) for index, length in enumerate(lengths)]
    wanted = [SamplerSettings(max_new_tokens=count) for count in counts[: len(prompts)]]
    found = speculate(
        model,
        facts(shift),
        prompts,
        wanted,
        range(len(prompts)),
        end_token_ids=[end],
        draft_length=draft_length,
        max_rows=max_rows,
    )
    for prompt, own, row in zip(prompts, wanted, found, strict=True):
        expected = greedy(model, prompt, own.max_new_tokens, ends=[end])
        assert row.ids == expected
        assert row.finish_reason == ("end" if expected[-1] == end else "length")
        assert row.pass_of_token == sorted(row.pass_of_token)
        assert row.num_forwards == row.pass_of_token[-1] + 1


def test_greedy_text_is_that_of_transformers_generate():
    model, prompt = model_of("qwen3"), prompt_of(6, seed=1)
    config = GenerationConfig(do_sample=False, max_new_tokens=12, suppress_tokens=[MASK], pad_token_id=0)
    written = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    assert speculate(model, facts(1), [prompt], [SamplerSettings(max_new_tokens=12)], [0])[0].ids == written


def test_a_pass_brings_all_drafts_and_one_token_more_where_all_are_right():
    """A model that reads nothing predicts the same token everywhere, masks included."""
    model = FAMILIES["qwen3"](tie_word_embeddings=False).double().eval()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings.copy_(embeddings[:1].expand_as(embeddings))
    count = 1 + 3 * 5  # the prompt's pass brings one token, every later one m + 1
    for shift, draft_length in product((0, 1), (2, 4)):
        found = speculate(
            model, facts(shift), [[5, 6]], [SamplerSettings(max_new_tokens=count)], [0], draft_length=draft_length
        )[0]
        assert found.ids == greedy(model, [5, 6], count)
        assert found.num_forwards == 1 + 15 // (draft_length + 1)


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
    found = speculate(
        model, facts(shift), [prompt] * num_rows, [own] * num_rows, range(num_rows), draft_length=2, max_rows=1000
    )
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
    from decausal.sampling.blocks.speculative import probabilities
    from decausal.sampling.row_settings import RowSettings

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


def test_a_row_does_not_depend_on_its_batch_mates():
    model = model_of("llama")
    prompts = [prompt_of(length, seed=length) for length in (3, 8, 1, 5, 5)]
    own = [SamplerSettings(max_new_tokens=6 + index, temperature=index / 2) for index in range(5)]
    together = speculate(model, facts(1), prompts, own, range(5), max_rows=3)
    for index in range(5):
        assert speculate(model, facts(1), [prompts[index]], [own[index]], [index])[0] == together[index]


def test_a_row_stops_where_it_is_told_to():
    model, prompt = model_of("llama"), prompt_of(4, seed=0)
    own = SamplerSettings(max_new_tokens=20)
    found = speculate(model, facts(1), [prompt], [own], [0], is_stopped=lambda row, ids: len(ids) >= 5)[0]
    assert found.finish_reason == "stop"
    assert 5 <= len(found.ids) < 20
    assert found.ids == greedy(model, prompt, len(found.ids))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": [[]]}, "empty"),
        ({"draft_length": 0}, "draft_length=0"),
        ({"facts": dataclasses.replace(facts(1), layout="causal", block_size=None)}, "causal"),
        ({"settings": [SamplerSettings(max_new_tokens=10**6)]}, "context"),
    ],
)
def test_what_cannot_be_speculated_is_refused(changes, named):
    values = {"facts": facts(1), "prompts": [[5]], "settings": [SamplerSettings(max_new_tokens=2)], "seeds": [0]}
    with pytest.raises(UserError, match=named):
        speculate(model_of("qwen3"), **values | changes)
