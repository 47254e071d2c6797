"""Keys and values of an earlier pass: when they are exact, what they spare, and that rows stay independent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted
from decausal.sampling.filling.infilling import infill
from decausal.sampling.generate import generate
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import prompt_ids, text_ids
from tests.families import FAMILIES, SLIDING_WINDOW, tiny_tokenizer
from tests.sampling.denoising import Denoised, denoise
from tests.sampling.stand_ins import conversion_facts
from tests.sampling.tiny_models import converted

PROMPTS = ["def area(width, height):", "import", "x = [1, 2"]
OPTIONS: list[dict[str, Any]] = [
    {"window": 4, "num_steps": 6},
    {"window": 3, "threshold": 0.3, "temperature": 1.0},
    {"window": 5, "num_steps": 8, "remask": "p2", "temperature": 0.8},
    {"window": 4, "num_steps": 9, "remask": "remdm", "remask_rate": 0.5},
    {"window": 4, "num_steps": 6, "guidance": 1.0},
]


def one_layer(family: str, shift: int) -> Converted:
    """A model whose keys and values depend on no token but their own."""
    layer_types = {"layer_types": ["sliding_attention"]} if family == "gemma2" else {}
    depth = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    model, tokenizer = FAMILIES[family](**depth, **layer_types), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer)
    model.get_output_embeddings().weight.data *= 4  # sharper: rounding then decides no comparison
    return Converted(model, tokenizer, conversion_facts(mask_token_id, shift=shift))


def filled(model: Converted, **options: Any) -> Denoised:
    """Rows of three lengths, two of them with a gap in the middle and one with two gaps."""
    before, after = prompt_ids(model, PROMPTS[0]), text_ids(model.tokenizer, "return")
    rows = [
        Row((before, after), (9,), "first"),
        Row((before[:3], after[:2], after), (5, 6), "second"),
        Row((before[:7], []), (13,), "third"),
    ]
    lengths = [row.length for row in rows]
    ids, is_open = torch.zeros(3, max(lengths), dtype=torch.long), torch.zeros(3, max(lengths), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : row.length] = torch.tensor(row.ids(0))
        for span in row.spans():
            is_open[index, span.start : span.stop] = True
    settings = SamplerSettings().updated(**options)
    return denoise(model.model, model.facts, ids, is_open, settings, lengths=lengths)


def same(first: Denoised, second: Denoised) -> bool:
    names = ("ids", "step_of_token", "num_forwards")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_cache_that_is_renewed_in_every_pass_changes_nothing(shift: int, cache: str, options: dict[str, Any]) -> None:
    model = converted(shift=shift)
    plain, cached = filled(model, **options), filled(model, cache=cache, cache_refresh=1, **options)
    assert same(plain, cached)
    assert torch.equal(plain.num_tokens_read, cached.num_tokens_read)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(("family", "shift"), [("qwen3", 0), ("qwen3", 1), ("gemma2", 1), ("mistral", 0), ("gpt2", 1)])
def test_in_a_model_of_one_layer_a_cache_that_is_never_renewed_is_exact(
    family: str, shift: int, cache: str, options: dict[str, Any]
) -> None:
    model = one_layer(family, shift)
    assert SLIDING_WINDOW < 9
    plain, cached = filled(model, **options), filled(model, cache=cache, **options)
    assert same(plain, cached)
    assert (cached.num_tokens_read < plain.num_tokens_read).all()


def test_what_is_read_is_the_row_once_for_each_window_and_else_the_window() -> None:
    model = converted(shift=1)
    row = Row((prompt_ids(model, "import"), text_ids(model.tokenizer, "a b c d e")), (8,), "row")
    ids, is_open = torch.tensor([row.ids(0)]), torch.zeros(1, row.length, dtype=torch.bool)
    for span in row.spans():
        is_open[:, span.start : span.stop] = True
    first, length = row.spans()[0].start, row.length
    read = {}
    for cache, refresh in (("none", None), ("prefix", None), ("dual", None), ("dual", 2)):
        settings = SamplerSettings(num_steps=8, window=4, cache=cache, cache_refresh=refresh)
        read[cache, refresh] = int(denoise(model.model, model.facts, ids, is_open, settings).num_tokens_read)
    assert read["none", None] == 8 * length
    # With shift 1 the state before a window predicts its first token, so that token is read again, too.
    assert read["dual", None] == 2 * length + 6 * (4 + 1)
    assert read["dual", 2] == 4 * length + 4 * (4 + 1)
    assert read["prefix", None] == 2 * length + 3 * (length - first + 1) + 3 * (length - first - 4 + 1)


def test_a_cache_spares_reading_and_may_change_what_is_written() -> None:
    model = converted(shift=1)
    options = {"max_new_tokens": 24, "window": 12, "num_steps": 24, "temperature": 1.5}
    plain, cached = (generate(model, PROMPTS, cache=cache, **options) for cache in ("none", "dual"))
    assert [row.num_forwards for row in plain] == [row.num_forwards for row in cached]
    assert any(one.ids != other.ids for one, other in zip(plain, cached, strict=True)), "the cache is not read"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize(("cache", "refresh"), [("prefix", None), ("dual", 3)])
def test_a_row_with_a_cache_does_not_depend_on_its_batch_mates(
    family: str, cache: str, refresh: int | None, options: dict[str, Any]
) -> None:
    model = converted(family)
    options = options | {"cache": cache, "cache_refresh": refresh}
    together = generate(model, PROMPTS, max_new_tokens=11, seed=5, **options)
    alone = [generate(model, prompt, max_new_tokens=11, seed=5 + i, **options) for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    gaps = infill(model, PROMPTS, [" = b", "", "x"], 7, batch_size=2, seed=5, **options)
    assert gaps == [
        infill(model, prompt, suffix, 7, seed=5 + i, **options)
        for i, (prompt, suffix) in enumerate(zip(PROMPTS, [" = b", "", "x"], strict=True))
    ]
