"""A run's first look asks the first layers of each kind, and misses nothing that layers of one kind can hide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from decausal.errors import UserError
from decausal.models.backbone import body_forward, decoder_layers
from decausal.models.doctor import refuse_if_unusable
from decausal.models.layer_kinds import first_layers, num_telling_layers
from decausal.models.questions import CAUSAL, QUESTIONS
from tests.families import FAMILIES, UNUSABLE_FAMILIES

DEEP = 6


def passes(model: nn.Module) -> list[int]:
    """Counts the passes through each layer."""
    counts = [0] * len(decoder_layers(model))
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    return counts


def windowed() -> nn.Module:
    """Five layers of a sliding window and one without, as Gemma 3 has them."""
    layer_types = ["sliding_attention"] * (DEEP - 1) + ["full_attention"]
    return FAMILIES["gemma3"](num_hidden_layers=DEEP, layer_types=layer_types)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: FAMILIES["llama"](num_hidden_layers=DEEP), 2),
        (lambda: FAMILIES["qwen3_moe"](num_hidden_layers=DEEP), 2),
        (lambda: FAMILIES["qwen3_moe"](num_hidden_layers=DEEP, mlp_only_layers=[3]), 4),
        (lambda: FAMILIES["llama"](num_hidden_layers=1), 1),
        (windowed, DEEP),
    ],
    ids=["alike", "experts", "one without experts", "one", "windows"],
)
def test_as_many_first_layers_are_asked_as_hold_each_kind(make, count: int) -> None:
    assert num_telling_layers(make()) == count


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_moe", "olmo2"])
def test_the_deeper_layers_are_run_once(family: str) -> None:
    model = FAMILIES[family](num_hidden_layers=DEEP)
    counts = passes(model)
    refuse_if_unusable(model)
    about_layers = sum(question.required and question.of_all_layers for question in QUESTIONS)
    assert set(counts[2:]) == {about_layers}
    assert min(counts[:2]) > about_layers


def test_fewer_layers_are_the_same_as_the_model_cut_there() -> None:
    model, ids = FAMILIES["llama"](num_hidden_layers=DEEP), torch.arange(12)[None]
    cut = FAMILIES["llama"](num_hidden_layers=2)
    cut.load_state_dict(model.state_dict(), strict=False)
    before = model.config.to_dict()
    with torch.no_grad(), first_layers(model, 2):
        found = body_forward(model, ids, CAUSAL).last_hidden_state
    assert model.config.to_dict() == before
    with torch.no_grad():
        torch.testing.assert_close(found, body_forward(cut, ids, CAUSAL).last_hidden_state, rtol=0, atol=0)


class _Leaking(nn.Module):
    """An attention that adds what the row's last token holds to every state."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        output, *rest = self.attention(hidden_states, *args, **kwargs)
        return output + 0.1 * hidden_states[:, -1:], *rest


@pytest.mark.parametrize("number", range(DEEP))
def test_one_layer_of_another_kind_is_found_wherever_it_is(number: int) -> None:
    model = FAMILIES["llama"](num_hidden_layers=DEEP)
    layer = decoder_layers(model)[number]
    layer.self_attn = _Leaking(layer.self_attn)
    with pytest.raises(UserError, match=r"causal layout|leak|document|other tokens|attention mask"):
        refuse_if_unusable(model)


@pytest.mark.parametrize("family", sorted(UNUSABLE_FAMILIES))
def test_what_is_refused_concerns_the_whole_model(family: str) -> None:
    reported = []
    for depth in (2, DEEP):
        layers = {"attention_types": [[["global", "local"], depth // 2]]} if family == "gpt_neo" else {}
        name = "num_layers" if family == "gpt_neo" else "num_hidden_layers"
        with pytest.raises(UserError) as refused:
            refuse_if_unusable(UNUSABLE_FAMILIES[family](**{name: depth}, **layers))
        reported.append(str(refused.value).partition(" (probe")[0])
    assert reported[0] == reported[1]
