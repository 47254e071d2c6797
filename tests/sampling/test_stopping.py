"""Texts and tokens that end a row, special tokens among them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from tokenizers import AddedToken

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.engines import engine_for
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids, text_before_stop, tokens_to_stop
from tests.families import tiny_tokenizer
from tests.sampling.tiny_models import converted

TOKENIZER = tiny_tokenizer(chat=True)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bidirectional": ({}, {}),
    "blocks": ({"layout": "block", "block_size": 4}, {}),
    "speculative": ({"layout": "block", "block_size": 4}, {"speculative": True, "draft": "quadratic"}),
}


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "stop", "ended", "shown"),
    [
        ("a<|im_end|>\nb", "<|im_end|>", "a<|im_end|>", "a"),
        ("a<|im_end|>b<|im_end|>\nc", "<|im_end|>\n", "a<|im_end|>b<|im_end|>\n", "ab"),
        ("one END<|im_end|>b", "END<|im_end|>", "one END<|im_end|>", "one "),
        ("a<|im_end|><|im_start|>user", "<|im_end|><|im_start|>u", "a<|im_end|><|im_start|>u", "a"),
        ("END a<|im_end|>", "END<|im_end|>", None, "END a"),
        ("a<|im_start|>b", "ab", "a<|im_start|>b", ""),
    ],
)
def test_a_stop_text_may_hold_special_tokens(text: str, stop: str, ended: str | None, shown: str) -> None:
    settings, before, new = SamplerSettings(stop=("zz", stop)), ids_of("x = "), ids_of(text)
    count = tokens_to_stop(TOKENIZER, before, new, 0, settings)
    assert count == (None if ended is None else len(ids_of(ended)))
    for num_searched in range(count or len(new)):
        assert tokens_to_stop(TOKENIZER, before, new, num_searched, settings) == count
    assert text_before_stop(TOKENIZER, before, new[:count], settings) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_stops_at_special_tokens_and_at_token_ids(kind: str) -> None:
    facts, options = KINDS[kind]
    model = converted(**facts)
    prompt, options = "x = [1, 2", {"max_new_tokens": 16, "temperature": 2.0, "seed": 3, **options}
    whole = generate(model, prompt, **options)
    number = next(i for i in range(5, 16) if whole.ids[i] not in whole.ids[:i] and whole.ids[i] not in ends(model))
    token = whole.ids[number]
    before = generate(model, prompt, **options, stop_token_ids=token)
    assert (before.ids, before.finish_reason) == (whole.ids[: number + 1], "stop")
    assert whole.text.startswith(before.text)
    assert before.text == text_before_stop(model.tokenizer, [], whole.ids[:number], SamplerSettings())

    name = model.tokenizer.convert_ids_to_tokens(token)
    special = Converted(model.model, deepcopy(model.tokenizer), model.facts)
    special.tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(name, special=True)]})
    assert generate(special, prompt, **options, stop=name).ids == before.ids

    settings = SamplerSettings().updated(**options, stop_token_ids=[token])
    row = Row((model.tokenizer(prompt)["input_ids"], []), (16,), "the prompt")
    engine = engine_for(model, max_rows=2, max_length=64)
    ((_, ended),) = run(engine, [Job(row, settings, 3, ends(model))])
    assert (ended.ids, ended.reason) == (before.ids, "stop")


def ends(model: Converted) -> tuple[int, ...]:
    return end_token_ids(model)


def test_a_stop_token_that_is_never_written_is_refused() -> None:
    model = converted()
    mask = model.facts.mask_token_id
    with pytest.raises(UserError, match=f"stop_token_ids holds {mask}, the mask token, which is never written"):
        generate(model, "x", max_new_tokens=2, stop_token_ids=mask)
    with pytest.raises(UserError, match="stop_token_ids holds 99999, and the vocabulary has"):
        generate(model, "x", max_new_tokens=2, stop_token_ids=[1, 99999])
    with pytest.raises(UserError, match=r"stop_token_ids=.* is not accepted: it must be a token id of at least 0"):
        SamplerSettings().updated(stop_token_ids=[-1])
