"""Classifier-free guidance: the formula, its cost, and rows without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decausal.diffusion.shift import predicting_index
from decausal.models import backbone
from decausal.sampling.generate import generate
from decausal.sampling.selection import guided
from decausal.sampling.settings import SamplerSettings
from tests.sampling.denoising import denoise
from tests.sampling.stand_ins import conversion_facts, written
from tests.sampling.tiny_models import converted

PROMPTS = ["def area(width, height):", "import", "x = [1, 2"]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("guidance", [0.5, 3.0])
def test_one_greedy_step_takes_the_best_of_the_logits_led_away_from_those_without_the_prompt(
    shift: int, guidance: float
) -> None:
    model = converted(shift=shift)
    mask = model.facts.mask_token_id
    ids = torch.randint(200, (3, 20), generator=torch.Generator().manual_seed(1))
    is_open = (torch.arange(20) % 3 != 0).expand(3, -1)
    settings = SamplerSettings(num_steps=1, guidance=guidance)
    denoised = denoise(model.model, model.facts, ids, is_open, settings)
    with torch.no_grad():
        given = backbone.logits(model.model, ids.masked_fill(is_open, mask), model.facts.attention).flatten(0, 1)
        nothing = backbone.logits(model.model, torch.full_like(ids, mask), model.facts.attention).flatten(0, 1)
    index = predicting_index(is_open.flatten().nonzero().squeeze(1), shift)
    led = nothing[index] + (1 + guidance) * (given[index] - nothing[index])
    led[:, mask] = -torch.inf
    assert torch.equal(denoised.ids[is_open], led.argmax(-1))
    assert (denoised.ids[is_open] != given[index].argmax(-1)).any(), "guidance changes nothing here"


def test_where_the_prompt_says_nothing_guidance_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(monkeypatch, [[0.1, 0.2, 0.3, 0.4]] * 8)
    is_open = (torch.arange(8) > 2).expand(5, -1)
    ids = torch.zeros(5, 8, dtype=torch.long)
    plain, led = (
        denoise(model, conversion_facts(4), ids, is_open, SamplerSettings(num_steps=5, temperature=1.0, guidance=w))
        for w in (0.0, 2.0)
    )
    assert torch.equal(plain.ids, led.ids)
    assert torch.equal(2 * plain.num_forwards, led.num_forwards)
    assert torch.equal(2 * plain.num_tokens_read, led.num_tokens_read)


def test_a_banned_token_stays_banned_and_a_weight_of_zero_changes_no_bit() -> None:
    values = torch.randn(4, 6)
    values[:, 5] = -torch.inf
    without = torch.randn(4, 6).where(torch.arange(6) != 5, -torch.inf)
    led = guided(values, without, torch.tensor([0.0, 1.0, 5.0, 0.0]))
    assert (led[:, 5] == -torch.inf).all()
    assert torch.equal(led[[0, 3]], values[[0, 3]])
    assert led[:, :5].isfinite().all()


@pytest.mark.parametrize("options", [{"num_steps": 4}, {"threshold": 0.4, "temperature": 1.0}, {"remask": True}])
def test_passes_are_counted_twice_and_rows_do_not_depend_on_each_other(options: dict[str, Any]) -> None:
    model = converted()
    calls: list[int] = []
    hook = model.model.base_model.register_forward_hook(lambda *call: calls.append(1))
    together = generate(model, PROMPTS, max_new_tokens=9, guidance=1.5, seed=2, **options)
    hook.remove()
    assert max(row.num_forwards for row in together) == len(calls)
    for row in together:
        assert row.num_forwards == 2 * (max(row.step_of_token) + 1)
        assert row.tokens_per_forward == pytest.approx(len(row.ids) / row.num_forwards)
    assert together == [
        generate(model, prompt, max_new_tokens=9, guidance=1.5, seed=2 + i, **options)
        for i, prompt in enumerate(PROMPTS)
    ]
