"""Self-speculation as generate offers it: the causal model's text, its end, its stops, and what it goes with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.engine import BlockEngine, Request
from decausal.sampling.filling.infilling import infill
from decausal.sampling.generate import generate
from decausal.sampling.settings import SamplerSettings
from tests.sampling.tiny_models import converted

PROMPTS = ["def area(width, height):", "import", "x = [1, 2"]


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted(layout="block", block_size=4)


def test_text_is_what_the_weights_write_under_causal_attention(model: Converted) -> None:
    causal = Converted(model.model, model.tokenizer, replace(model.facts, layout="causal", block_size=None))
    found = generate(model, PROMPTS, max_new_tokens=13, speculative=True)
    assert [row.ids for row in found] == [_greedy(causal, prompt, 13) for prompt in PROMPTS]


def _greedy(causal: Converted, prompt: str, max_new_tokens: int) -> list[int]:
    engine = BlockEngine(causal.model, causal.facts, max_rows=1, end_token_ids=(causal.tokenizer.eos_token_id,))
    ids = causal.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (row,) = engine.run([Request(ids, SamplerSettings(max_new_tokens=max_new_tokens), 0)])
    return row.ids


def test_a_stop_text_cuts_where_it_does_token_by_token(model: Converted) -> None:
    whole = generate(model, PROMPTS[0], max_new_tokens=20, speculative=True)
    stop = whole.text[4:7]
    cut = generate(model, PROMPTS[0], max_new_tokens=20, speculative=True, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]


def test_rows_draw_from_their_own_seeds(model: Converted) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.0, "speculative": True}
    together = generate(model, PROMPTS, seed=5, batch_size=2, **options)
    assert together == [generate(model, prompt, seed=5 + row, **options) for row, prompt in enumerate(PROMPTS)]


def test_it_is_refused_where_rows_are_denoised(model: Converted) -> None:
    bidirectional = converted()
    with pytest.raises(UserError, match="speculative"):
        infill(bidirectional, "a", "b", 3, speculative=True)
    with pytest.raises(UserError, match="speculative"):
        BlockEngine(model.model, model.facts, max_rows=1).submit(Request([5], SamplerSettings(speculative=True), 0))
    causal = Converted(model.model, model.tokenizer, replace(model.facts, layout="causal", block_size=None))
    options = {"max_new_tokens": 4, "speculative": True}
    with pytest.raises(UserError, match="causal"):
        generate(causal, "a", **options)
    with pytest.raises(UserError, match="watch"):
        generate(model, "a", on_step=lambda *_: None, **options)
    with pytest.raises(UserError, match="mask token"):
        generate(model, model.tokenizer.mask_token, **options)
