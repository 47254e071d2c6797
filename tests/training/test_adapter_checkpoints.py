"""What a LoRA run leaves at each save is a model like the one at its end, and an adapter of others can be merged."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from starlette.testclient import TestClient
from transformers import PreTrainedModel

from decausal import load
from decausal.errors import LONGEST_LINE, UserError
from decausal.exchange.plain import export_plain
from decausal.models.adapt import load_source
from decausal.models.checkpoint import load_converted
from decausal.models.examination import examine_path
from decausal.models.names import check_converted, check_source
from decausal.serving.app import create_app
from decausal.serving.metrics import Metrics
from decausal.serving.server import models_of
from decausal.serving.settings import ServeSettings
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import assert_same, run, save_source, weights, write_text

LORA: dict[str, Any] = {"lora_r": 2, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "save_dtype": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", 8)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def made(request, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run with tied embeddings, and one without."""
    root = tmp_path_factory.mktemp(request.param)
    save_source(root / "source", request.param, chat=True)
    run(root / "source", text, root / "out", **LORA)
    return root / "out"


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_the_last_checkpoint_is_the_final_model(made: Path) -> None:
    last, final = load_converted(made / "checkpoint-2"), load_converted(made)
    assert last.facts == final.facts
    assert_same(state(last.model), state(final.model), atol=1e-6)
    assert last.model.generation_config.eos_token_id == final.model.generation_config.eos_token_id
    assert last.model.config.is_causal == final.model.config.is_causal
    assert type(last.model) is type(final.model)


def test_loading_one_shows_nothing_of_what_libraries_tell_their_developers(
    made: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    warnings.simplefilter("always")
    load_converted(made / "checkpoint-2")
    assert [str(warning.message) for warning in recwarn] == []
    assert caplog.messages == []


def test_an_earlier_checkpoint_is_an_earlier_model(made: Path) -> None:
    first, final = load_converted(made / "checkpoint-1").model, load_converted(made).model
    mask_token_id = load_converted(made).facts.mask_token_id
    moved = first.get_input_embeddings().weight[mask_token_id] - final.get_input_embeddings().weight[mask_token_id]
    assert moved.abs().max() > 1e-4


def test_it_is_served_beside_its_source(made: Path) -> None:
    settings, metrics = ServeSettings(), Metrics()
    models = models_of(made / "checkpoint-1", settings, metrics, with_source=True)
    asked = {"prompt": "the rain", "max_tokens": 4, "seed": 1}
    with TestClient(create_app(models, settings, metrics), base_url="http://localhost") as client:
        names = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert names == ["checkpoint-1", "checkpoint-1-source"]
        texts = [
            client.post("/v1/completions", json={"model": name, **asked}).json()["choices"][0]["text"] for name in names
        ]
    assert texts[0] == load(made / "checkpoint-1").generate("the rain", max_new_tokens=4, seed=1).text
    assert texts[1]


def test_it_writes_is_examined_exported_and_trained_on(made: Path, text: Path, tmp_path: Path, capfd) -> None:
    checkpoint = made / "checkpoint-2"
    assert load(checkpoint, dtype=torch.bfloat16).generate("the", max_new_tokens=2).text is not None
    assert all(probe.passed for probe in examine_path(str(checkpoint)) if probe.required)
    capfd.readouterr()
    export_plain(checkpoint, tmp_path / "exported")
    assert capfd.readouterr().err == ""  # no bars
    assert_same(weights(tmp_path / "exported"), weights(made), atol=1e-6)
    run(checkpoint, text, tmp_path / "on", max_steps=1, save_strategy="no", token_weight=1.0)
    assert weights(tmp_path / "on").keys() == weights(made).keys()


def test_checkpoints_of_a_second_stage_begin_with_the_first(made: Path, text: Path, tmp_path: Path) -> None:
    run(made, text, tmp_path / "second", **LORA)
    last, final = load_converted(tmp_path / "second" / "checkpoint-2"), load_converted(tmp_path / "second")
    assert_same(state(last.model), state(final.model), atol=1e-6)


def test_a_base_that_is_gone_is_one_line(made: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(made / "checkpoint-2", tmp_path / "checkpoint-2")
    facts = json.loads((checkpoint / "decausal.json").read_text())
    facts["recipe"]["model_name_or_path"] = str(tmp_path / "gone")
    (checkpoint / "decausal.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"checkpoint-2 holds adapters on .*gone, which cannot be loaded: .*not exist"):
        load_converted(checkpoint)


def test_a_checkpoint_without_its_mask_row_is_refused(made: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(made / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / "mask_row.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2 lacks mask_row.safetensors, the mask token's row; fetch it"):
        load_converted(checkpoint)


# Adapters of others


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    source = save_source(root / "source")
    model, _ = load_source(source)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    wrapped.save_pretrained(root / "adapter")
    return root / "adapter"


def merged_by_hand(adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model, _ = load_source(adapter.parent / "source")
    return state(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload())


def test_an_adapter_is_distinguished_from_a_model(adapter: Path) -> None:
    for refuse in (check_source, load_source, check_converted, load_converted):
        with pytest.raises(UserError, match=r"is a PEFT adapter on .*source and not a whole.*--merge_adapter true"):
            refuse(adapter)


def test_a_flag_merges_it(adapter: Path, text: Path, tmp_path: Path) -> None:
    made = run(adapter, text, tmp_path / "out", merge_adapter=True, max_steps=1, learning_rate=0.0, save_strategy="no")
    assert made.facts.source == str(adapter)
    expected, found = merged_by_hand(adapter), load_converted(tmp_path / "out").model.state_dict()
    rows = len(tiny_tokenizer())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name][:rows] if "embed" in name or "head" in name else found[name], tensor)
    assert all(probe.passed for probe in examine_path(str(adapter)) if probe.required)


def test_an_adapter_whose_weights_are_cut_off_is_one_line(adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken")
    path = broken / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is cut off"):
        check_source(broken, merge_adapter=True)


def test_an_adapter_that_does_not_fit_is_one_line(adapter: Path, tmp_path: Path) -> None:
    other = save_source(tmp_path / "other", hidden_size=48)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    settings = json.loads((broken / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
    (broken / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"does not fit its base model") as caught:
        load_source(broken, merge_adapter=True)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_larger_model_names_some_of_the_weights_that_are_missing(tmp_path: Path) -> None:
    model = save_source(tmp_path / "model", num_hidden_layers=12)
    get_peft_model(FAMILIES["qwen3"](), LoraConfig(target_modules=["q_proj", "up_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(model)}))
    with pytest.raises(UserError, match=r"does not fit its base model: .* \.\.\.$") as caught:
        load_source(tmp_path / "adapter", merge_adapter=True)
    assert len(str(caught.value)) < LONGEST_LINE + 300


def test_prompts_that_were_tuned_cannot_be_merged(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"adapter of type PREFIX_TUNING, which has no merged form"):
        load_source(tmp_path, merge_adapter=True)
