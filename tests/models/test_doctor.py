"""The probes let good models in, and keep each kind of bad one out with its reason."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models import backbone, examination, row_attention
from decausal.models.adapt import adapt
from decausal.models.architecture import RECURRENT_MODEL_TYPES, refusal, sliding_windows
from decausal.models.backbone import HONOURS_IS_CAUSAL, body_forward
from decausal.models.doctor import examine, probes_as_dict, refuse_if_unusable, usable
from decausal.models.examination import examine_path
from decausal.models.facts import ConversionFacts
from tests.families import FAMILIES, OTHER_FAMILIES, UNUSABLE_FAMILIES, VOCAB_SIZE, tiny_tokenizer

ALL_USABLE = FAMILIES | OTHER_FAMILIES


def failed(model: nn.Module, **arguments) -> set[str]:
    return {probe.name.split(":")[0] for probe in examine(model, **arguments) if not probe.passed and probe.required}


@pytest.mark.parametrize("family", ALL_USABLE)
def test_usable_families_pass_every_probe(family: str) -> None:
    assert failed(ALL_USABLE[family]()) == set()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "mixtral"])
def test_probes_pass_in_bfloat16(family: str) -> None:
    assert failed(FAMILIES[family]().to(torch.bfloat16)) == set()


def test_a_path_is_examined_in_the_type_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(examination, "examine", lambda model, *_: seen.append(model.dtype) or [])
    for dtype in (torch.bfloat16, torch.float32):
        examine_path("tiny", dtype=dtype)
    assert seen == [torch.bfloat16, torch.float32]


def test_every_family_trusted_with_is_causal_is_measured_here() -> None:
    assert {make().config.model_type for make in ALL_USABLE.values()} >= HONOURS_IS_CAUSAL


@pytest.mark.parametrize("family", FAMILIES)
def test_promised_families_need_no_mask_for_whole_documents(family: str) -> None:
    model = FAMILIES[family](**({"sliding_window": 64} if "sliding_window" in FAMILIES[family].args[1] else {}))
    seen = []
    model.base_model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    body_forward(model, torch.arange(12)[None], Layout("bidirectional"))
    assert "attention_mask" not in seen[0]


def test_hard_causal_family_is_refused_because_it_stays_causal() -> None:
    with pytest.raises(UserError, match="'gpt_neo' cannot be used: a later token does not change an earlier state"):
        refuse_if_unusable(UNUSABLE_FAMILIES["gpt_neo"]())


def test_family_that_takes_no_layout_mask_is_refused_because_of_that() -> None:
    with pytest.raises(UserError, match="'bloom' cannot be used: it ignores or alters the attention mask"):
        refuse_if_unusable(UNUSABLE_FAMILIES["bloom"]())


@pytest.mark.parametrize("kind", sorted(RECURRENT_MODEL_TYPES & set(CONFIG_MAPPING_NAMES)))
def test_recurrent_models_are_refused_by_name(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    assert f"'{kind}' has recurrent layers" in refusal(config)


def test_a_hybrid_unknown_by_name_is_refused_by_its_layer_types() -> None:
    config = FAMILIES["qwen3"]().config
    config.layer_types = ["linear_attention", "full_attention"]
    assert "recurrent layers (linear_attention)" in refusal(config)


def test_granite_4_is_refused_with_recurrent_layers_only() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "mamba_n_heads": 4}
    hybrid = AutoConfig.for_model("granitemoehybrid", **sizes, layer_types=["mamba", "attention"])
    assert "recurrent layers" in refusal(hybrid)
    assert refusal(AutoConfig.for_model("granitemoehybrid", **sizes, layer_types=["attention"] * 2)) is None


def test_recurrent_layers_are_the_only_finding_of_a_refused_architecture() -> None:
    model = FAMILIES["qwen3"]()
    model.config.layer_types = ["linear_attention", "full_attention"]
    probes = examine(model)
    assert len(probes) == 1
    assert not usable(probes)
    with pytest.raises(UserError, match="recurrent layers"):
        refuse_if_unusable(model)


def test_layers_whose_reach_is_no_window_are_refused() -> None:
    model = FAMILIES["qwen3"]()
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        sliding_windows(model.config)
    assert "explicit attention masks are honoured" in failed(model)


def test_a_wrong_reading_of_the_head_is_found() -> None:
    model = FAMILIES["granite"]()
    model.config.model_type = "hyperclovax"  # whose scale multiplies where Granite's divides
    assert "output head is understood" in failed(model)


def test_leaking_documents_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything_open(layout: Layout, documents: Tensor, *_: object) -> Tensor:
        return torch.ones(len(documents), 1, *documents.shape[1:] * 2, dtype=torch.bool)

    monkeypatch.setattr(row_attention, "attention_mask", everything_open)
    found = failed(FAMILIES["llama"]())
    assert "packed documents do not leak into each other" in found
    assert "a packed document equals the same document alone" in found


def test_positions_that_do_not_restart_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backbone, "positions_in_documents", lambda documents: torch.arange(documents.shape[1]).expand_as(documents)
    )
    assert failed(FAMILIES["gpt2"]()) == {"a packed document equals the same document alone"}


def test_a_window_that_the_masks_ignore_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "sliding_windows", lambda config: {"every": None})
    assert "explicit attention masks are honoured" in failed(FAMILIES["mistral"](sliding_window=64))


def test_states_that_skip_a_layer_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    states = backbone._checked_states
    monkeypatch.setattr(backbone, "_checked_states", lambda *arguments: states(*arguments)[::-1])
    assert "hidden states are complete" in failed(FAMILIES["llama"]())


def test_a_converted_model_passes_and_a_wrong_mask_token_does_not() -> None:
    model, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer)
    facts = ConversionFacts(source="x", layout="bidirectional", shift=1, mask_token_id=mask_token_id)
    assert failed(model, tokenizer=tokenizer, facts=facts) == set()
    wrong = ConversionFacts(source="x", layout="bidirectional", shift=1, mask_token_id=VOCAB_SIZE + 9)
    assert failed(model, tokenizer=tokenizer, facts=wrong) == {"mask token has a row of its own"}


def test_examining_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["gemma2"]().train()
    config, weights = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examine(model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_findings_are_plain_json() -> None:
    found = json.loads(json.dumps(probes_as_dict(examine(UNUSABLE_FAMILIES["bloom"]()))))
    assert found["usable"] is False
    fields = {"name", "passed", "measured", "explanation", "required", "threshold", "decided_in", "noise_floor"}
    assert all(set(probe) == fields for probe in found["probes"])
