"""In a smaller type a model reads the same positions: only weights are cast, as in transformers' own loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decausal.models.adapt import load_source
from decausal.models.casting import cast_weights
from decausal.models.checkpoint import load_converted
from decausal.training import convert
from decausal.training.teacher import Teacher
from tests.families import FAMILIES, OTHER_FAMILIES
from tests.runs import GATED, run, save_source, write_text

BF16 = torch.bfloat16


def computed(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that no file holds."""
    held = model.state_dict()
    return {name.rpartition(".")[2]: buffer for name, buffer in model.named_buffers() if name not in held}


def assert_positions_are_exact(model: nn.Module, source: Path) -> None:
    """Asserts that weights are bfloat16 and rotary frequencies those of the source in fp32."""
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}
    expected, found = computed(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)), computed(model)
    frequencies = [name for name in expected if "inv_freq" in name]
    assert frequencies
    for name in frequencies:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source"), request.param)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl", 4)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_weights_are_cast_and_what_is_computed_stays(family: str) -> None:
    model = (FAMILIES | OTHER_FAMILIES)[family]()
    before = {name: buffer.clone() for name, buffer in computed(model).items()}
    expected = {name: tensor.to(BF16) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert cast_weights(model, BF16) is model
    found = model.state_dict()
    for name, tensor in expected.items():
        assert found[name].dtype == BF16, name
        assert torch.equal(found[name], tensor), name
    for name, buffer in computed(model).items():
        assert torch.equal(buffer, before[name]), name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_source_computes_what_transformers_own_loading_does(source: Path) -> None:
    model, _ = load_source(source, dtype=BF16)
    assert_positions_are_exact(model, source)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=BF16)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    "options",
    [{}, GATED | {"lora_r": 2, "save_dtype": "source"}, {"lora_r": 2, "save_strategy": "steps"}],
    ids=["plain", "gated", "adapters"],
)
def test_so_does_a_converted_model(source: Path, text: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    run(source, text, tmp_path / "out", **{"max_steps": 2, "save_strategy": "no", **options})
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    for directory in [tmp_path / "out", *checkpoints]:
        assert_positions_are_exact(load_converted(directory, dtype=BF16).model, source)


@pytest.mark.parametrize("named", [False, True], ids=["itself", "named"])
def test_so_does_a_teacher(
    source: Path, text: Path, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[nn.Module] = []

    def kept(model: nn.Module) -> Teacher:
        teachers.append(model)
        return Teacher(model)

    monkeypatch.setattr(convert, "Teacher", kept)
    options = {"teacher_model_name_or_path": str(source)} if named else {}
    run(source, text, tmp_path / "out", bf16=True, align_weight=1.0, max_steps=1, save_strategy="no", **options)
    assert_positions_are_exact(*teachers, source)
