"""Rounding is distinguished from a fault: a model that is only noisy passes, and the smallest leak does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from decausal.errors import UserError
from decausal.models import backbone
from decausal.models.block_cache import decoding, refuse_uncacheable
from decausal.models.doctor import Probe, examine, refuse_if_unusable
from decausal.models.float64 import in_float64
from decausal.models.questions import BIDIRECTIONAL
from decausal.models.rounding import noise_floor
from tests.families import FAMILIES, UNUSABLE_FAMILIES

SIZES = {torch.float32: 1e-6, torch.bfloat16: 3e-2}  # of faults: a few roundings
Fault = Callable[[nn.Module, pytest.MonkeyPatch, float], None]


def noisy(model: nn.Module, factor: float = 1.0) -> nn.Module:
    """Every matrix product is off in its last place, each time in another way: kernels that sum in any order."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, output: output * (1 + factor * torch.finfo(output.dtype).eps * torch.randn_like(output))
            )
    return model


def deep(family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Large activations and sharp attention in many layers, which amplify each rounding."""
    if family == "gemma3":  # whose attention is sharp, and its states large, by the weights of its norms
        kinds = [*["sliding_attention"] * 5, "full_attention"] * 5
        model = FAMILIES[family](num_hidden_layers=26, layer_types=kinds[:26], initializer_range=0.3)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight += 30 * torch.rand_like(weight)
        return model.to(dtype)
    model = FAMILIES[family](num_hidden_layers=8, initializer_range=0.3)
    with torch.no_grad():
        for layer in backbone.decoder_layers(model):
            layer.self_attn.q_proj.weight *= 30
    return model.to(dtype)


def by_name(probes: list[Probe]) -> dict[str, Probe]:
    return {probe.name: probe for probe in probes}


def failed(probes: list[Probe]) -> set[str]:
    return {probe.name.split(":")[0] for probe in probes if not probe.passed}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("qwen3_moe", torch.float16),
        ("gemma3", torch.float32),
    ],
)
def test_a_deep_model_that_is_only_noisy_passes_every_probe(family: str, dtype: torch.dtype) -> None:
    probes = examine(noisy(deep(family, dtype)))
    assert failed(probes) == set()
    packed = by_name(probes)["a packed document equals the same document alone"]
    assert packed.decided_in == "float64"
    assert packed.measured < packed.threshold
    assert 0 < packed.noise_floor < packed.threshold


def test_its_rounding_is_beyond_any_fixed_tolerance() -> None:
    rows = torch.arange(12)[None]
    model = noisy(deep())
    with torch.no_grad():
        first, second = (backbone.body_forward(model, rows, BIDIRECTIONAL).last_hidden_state for _ in range(2))
    assert (first - second).norm() / first.norm() > 1e-4


def test_a_noisy_model_can_be_used_and_decoded() -> None:
    model = noisy(deep())
    refuse_if_unusable(model)
    with decoding(model):
        refuse_uncacheable(model)


def test_a_model_that_stays_causal_is_refused_however_noisy() -> None:
    with pytest.raises(UserError, match="a later token does not change an earlier state"):
        refuse_if_unusable(noisy(UNUSABLE_FAMILIES["gpt_neo"](), factor=100))


def _scaled_under(condition: Callable[[dict], bool]) -> Fault:
    """A body whose states are a little off under some keywords."""

    def spoil(model: nn.Module, _: pytest.MonkeyPatch, size: float) -> None:
        def scale(_: nn.Module, __: tuple, kwargs: dict, output):
            if condition(kwargs):
                output.last_hidden_state = output.last_hidden_state * (1 + size)
            return output

        model.base_model.register_forward_hook(scale, with_kwargs=True)

    return spoil


def _head_is_scaled(model: nn.Module, _: pytest.MonkeyPatch, size: float) -> None:
    model.lm_head.register_forward_hook(lambda _, args, output: output * (1 + size))


def _masks_leak(_: nn.Module, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Hidden keys keep a little of their weight."""

    def leaky(is_visible: Tensor, body: nn.Module) -> Tensor:
        return torch.where(is_visible, 0.0, math.log(size)).to(body.dtype)

    monkeypatch.setattr(backbone, "as_the_attention_takes_it", leaky)


def _states_are_scaled(_: nn.Module, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    checked = backbone._checked_states

    def scaled(states: tuple[Tensor, ...], last: Tensor, *more: object) -> tuple[Tensor, ...]:
        return (*(state * (1 + size) for state in checked(states, last, *more)[:-1]), last)

    monkeypatch.setattr(backbone, "_checked_states", scaled)


def _places_count(model: nn.Module, _: pytest.MonkeyPatch, size: float) -> None:
    """A state depends on its place in the row, and not on its position in its document alone."""

    def by_place(_: nn.Module, args: tuple, output):
        states = output.last_hidden_state
        place = torch.arange(states.shape[1])[:, None]
        output.last_hidden_state = states * (1 + size * place).to(states.dtype)
        return output

    model.base_model.register_forward_hook(by_place)


def _under_a_mask(kwargs: dict) -> bool:
    return kwargs.get("attention_mask") is not None


FAULTS = [
    (_head_is_scaled, "output head is understood"),
    (_scaled_under(lambda kwargs: kwargs.get("is_causal")), "causal layout reproduces the source model"),
    (_masks_leak, "explicit attention masks are honoured"),
    (_scaled_under(_under_a_mask), "explicit attention masks are honoured"),
    (_states_are_scaled, "hidden states are complete"),
    (_masks_leak, "block layout"),
    (_masks_leak, "packed documents do not leak into each other"),
    (_places_count, "a packed document equals the same document alone"),
    (_scaled_under(lambda kwargs: kwargs.get("is_causal") is False), "the plain transformers class reads both ways"),
    (_scaled_under(lambda kwargs: kwargs["use_cache"]), "states are the same with a key/value cache"),
]


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize(("fault", "probe"), FAULTS)
def test_the_smallest_fault_fails_its_probe(
    fault: Fault, probe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"]().to(dtype)
    assert failed(examine(model)) == set()
    fault(model, monkeypatch, SIZES[dtype])
    assert probe in failed(examine(model))


@pytest.mark.parametrize("fault", [_masks_leak, _places_count])
def test_a_small_fault_of_a_noisy_model_is_no_rounding(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(deep())
    fault(model, monkeypatch, 1e-6)
    packed = by_name(examine(model))["a packed document equals the same document alone"]
    assert not packed.passed
    assert packed.decided_in == "float64"


def test_in_float64_nothing_is_rounded_to_less() -> None:
    model, rows = deep(), torch.arange(12)[None]
    with torch.no_grad(), in_float64(model.config):
        states = backbone.body_forward(model, rows, BIDIRECTIONAL).last_hidden_state
        assert noise_floor(model) < 1e-8
    assert states.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_weights_that_are_no_numbers_are_named_first(value: float, word: str) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    expected = f"cannot be used: the weights of model.layers.1.mlp.up_proj.weight hold {word} "
    with pytest.raises(UserError, match=expected):
        refuse_if_unusable(model)
    assert failed(examine(model)) == {"weights are finite"}


def test_activations_that_overflow_are_named() -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(UserError, match="its states are not finite in float16: its activations overflow"):
        refuse_if_unusable(model.half())
