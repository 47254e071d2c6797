"""Generate on tiny random models: identities, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from decausal.errors import UserError
from decausal.models import backbone
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling.filling.infilling import infill
from decausal.sampling.generate import generate
from decausal.sampling.generation import Generation
from decausal.sampling.model import DiffusionModel, load
from decausal.sampling.settings import SamplerSettings
from tests.families import EOS_ID, MAX_LENGTH
from tests.sampling.denoising import denoise
from tests.sampling.tiny_models import converted


@pytest.fixture(scope="module")
def qwen() -> Converted:
    return converted()


PROMPTS = ["def area(width, height):", "import", "x = [1, 2"]
SETTINGS = {
    "greedy static": {"num_steps": 4},
    "greedy dynamic": {"threshold": 0.6, "confidence": "margin"},
    "sampled": {"num_steps": 5, "temperature": 1.0, "top_p": 0.9, "confidence": "entropy"},
    "remasked": {"num_steps": 5, "temperature": 0.8, "top_k": 20, "remask": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt2", "qwen3_moe"])
def test_a_row_does_not_depend_on_its_batch_mates_or_on_padding(family: str, settings: dict[str, Any]) -> None:
    model = converted(family)
    together = generate(model, PROMPTS, max_new_tokens=9, seed=5, **settings)
    in_twos = generate(model, PROMPTS, max_new_tokens=9, seed=5, batch_size=2, **settings)
    alone = [generate(model, prompt, max_new_tokens=9, seed=5 + i, **settings) for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together == in_twos


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_num_forwards_counts_the_models_calls(qwen: Converted, settings: dict[str, Any]) -> None:
    calls: list[int] = []
    hook = qwen.model.base_model.register_forward_hook(lambda *call: calls.append(1))
    written = generate(qwen, PROMPTS, max_new_tokens=9, **settings)
    hook.remove()
    assert max(row.num_forwards for row in written) == len(calls)
    for row in written:
        assert row.tokens_per_forward == pytest.approx(len(row.ids) / row.num_forwards)
        assert max(row.step_of_token) == row.num_forwards - 1


def test_the_head_of_the_model_runs_through_no_other_door(qwen: Converted) -> None:
    calls: list[int] = []
    hook = qwen.model.get_output_embeddings().register_forward_hook(lambda *call: calls.append(1))
    generate(qwen, PROMPTS, max_new_tokens=4)
    hook.remove()
    assert not calls


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("layout", ["causal", "bidirectional"])
def test_one_greedy_step_takes_the_most_probable_tokens_of_the_full_logits(layout: str, shift: int) -> None:
    model = converted(layout=layout, shift=shift)
    mask = model.facts.mask_token_id
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(256, (3, 12), generator=generator)
    is_open = (torch.rand(3, 12, generator=generator) < 0.5) & (torch.arange(12) > 0)
    denoised = denoise(model.model, model.facts, ids, is_open, SamplerSettings(num_steps=1))
    full = backbone.logits(model.model, ids.masked_fill(is_open, mask), model.facts.attention)
    full[..., mask] = -torch.inf
    expected = full.argmax(-1).roll(shift, dims=1)
    assert torch.equal(denoised.ids, torch.where(is_open, expected, ids))


def test_a_causal_model_opened_one_position_at_a_time_writes_its_greedy_text() -> None:
    model = converted(layout="causal")
    mask = model.facts.mask_token_id
    prompt = torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])
    stock = model.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=[mask, EOS_ID],
        pad_token_id=EOS_ID,
    )
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, torch.full((1, 1), mask)], dim=1)
        is_open = torch.arange(ids.shape[1])[None] == ids.shape[1] - 1
        ids = denoise(model.model, model.facts, ids, is_open, SamplerSettings()).ids
    assert EOS_ID not in ids
    assert torch.equal(ids, stock)


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("schedule", [{"num_steps": 6}, {"threshold": 0.3}])
def test_what_is_kept_grows_every_step_and_nothing_given_changes(
    qwen: Converted, remask: bool, schedule: dict[str, Any]
) -> None:
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))
    is_open = torch.arange(24) % 3 != 0
    num_open: list[Tensor] = [torch.tensor([16, 16])]
    denoised = denoise(
        qwen.model,
        qwen.facts,
        ids,
        is_open.expand(2, -1),
        SamplerSettings(temperature=1.0, remask=remask, **schedule),
        on_step=lambda step, seen, still_open, new: num_open.append(still_open.sum(1)),
    )
    for before, after in pairwise(num_open):
        assert ((after < before) | (before == 0)).all()
    assert torch.equal(denoised.ids[:, ~is_open], ids[:, ~is_open])
    assert (denoised.ids != qwen.facts.mask_token_id).all()
    assert ((denoised.step_of_token >= 0) == is_open).all()


def test_generate_returns_one_for_a_string_and_a_list_for_a_list(qwen: Converted) -> None:
    one = generate(qwen, PROMPTS[0], max_new_tokens=3)
    assert isinstance(one, Generation)
    assert generate(qwen, PROMPTS[:1], max_new_tokens=3) == [one]
    assert one.full_text == PROMPTS[0] + one.text
    assert generate(qwen, [], max_new_tokens=3) == []


def test_text_is_cut_at_the_end_token_and_leaves_it_out(qwen: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate(qwen, PROMPTS[0], max_new_tokens=12, num_steps=12)
    # Any token can be an end: take one that the model writes in the middle.
    end = plain.ids[6]
    monkeypatch.setattr(qwen.model.generation_config, "eos_token_id", [end])
    cut = generate(qwen, PROMPTS[0], max_new_tokens=12, num_steps=12)
    assert cut.ids == plain.ids[: plain.ids.index(end) + 1]
    assert cut.num_forwards <= plain.num_forwards


def test_an_empty_prompt_starts_from_the_end_of_text_token(qwen: Converted) -> None:
    from_nothing = generate(qwen, "", max_new_tokens=4)
    assert from_nothing.ids == generate(qwen, "<|endoftext|>", max_new_tokens=4).ids
    assert from_nothing.full_text == from_nothing.text


def test_chat_puts_the_prompt_through_the_template(qwen: Converted) -> None:
    model = converted(chat=True)
    written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert generate(model, "hi", chat=True, max_new_tokens=4).ids == generate(model, written, max_new_tokens=4).ids
    with pytest.raises(UserError, match="chat template"):
        generate(qwen, "hi", chat=True)


def test_settings_stored_with_the_model_are_defaults(qwen: Converted) -> None:
    model = qwen._replace(facts=replace(qwen.facts, sampler={"num_steps": 2, "max_new_tokens": 6}))
    assert generate(model, PROMPTS[0]).num_forwards == 2
    assert generate(model, PROMPTS[0], steps=3).num_forwards == 3
    assert len(generate(model, PROMPTS[0], threshold=0.5, gen_length=7).ids) <= 7


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("x" * (MAX_LENGTH + 1), {}, f"has {MAX_LENGTH + 1} tokens, the model's context {MAX_LENGTH}"),
        ("x" * 60, {"max_new_tokens": 5}, f"65 exceed the model's context of {MAX_LENGTH}; write at most 4"),
        ("a <|mask|> b", {"max_new_tokens": 5}, r"holds the mask token '<\|mask\|>' \(id \d+\)"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens=0 is not accepted"),
        ("x", {"num_steps": 0}, "num_steps=0 is not accepted"),
        ("x", {"batch_size": 0}, "batch_size=0 is not accepted"),
        ("x", {"max_length": 5}, "unknown sampler setting 'max_length'"),
    ],
)
def test_bad_input_to_generate_is_refused(qwen: Converted, prompt: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        generate(qwen, prompt, **options)
    assert "\n" not in str(refused.value)


def test_the_refused_prompt_is_named_by_its_number(qwen: Converted) -> None:
    with pytest.raises(UserError, match="prompt 2 holds the mask token"):
        generate(qwen, ["x", "<|mask|>"], max_new_tokens=5)


@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_to_start_from_is_refused_where_a_start_is_needed(shift: int) -> None:
    model = converted(shift=shift)
    model.tokenizer.eos_token = None
    if shift == 0:
        assert len(generate(model, "", max_new_tokens=3, num_steps=1).ids) <= 3
    else:
        with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
            generate(model, "", max_new_tokens=3)


def test_a_saved_model_loads_and_writes_the_same(qwen: Converted, tmp_path: Any) -> None:
    save_converted(tmp_path, *qwen)
    loaded = load(tmp_path, device="cpu")
    assert isinstance(loaded, DiffusionModel)
    assert loaded.facts == qwen.facts
    assert loaded.generate(PROMPTS, max_new_tokens=4) == generate(qwen, PROMPTS, max_new_tokens=4)
    assert loaded.infill("a", "b", length=4) == infill(qwen, "a", "b", 4)
    assert loaded.model.dtype == torch.float32
