"""A head that is tied to the embeddings is written once, whatever the type and whatever was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decausal.models.checkpoint import load_converted
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import run, weights, write_text

TRAINED = {
    "whole": {},
    "frozen embeddings": {"freeze_embeddings": True},
    "lora": {"lora_r": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tied") / "model"
    FAMILIES["qwen3"]().to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("save_dtype", ["source", "bfloat16", "float32"])
def test_the_head_is_written_once(source: Path, tmp_path: Path, save_dtype: str, trained: str) -> None:
    data = write_text(tmp_path / "text.jsonl", 4)
    settings: dict[str, Any] = {"save_dtype": save_dtype, "max_steps": 1, "save_strategy": "no", **TRAINED[trained]}
    made = run(source, data, tmp_path / "out", **settings)
    written = weights(tmp_path / "out")
    assert "lm_head.weight" not in written
    assert written.keys() == weights(source).keys()
    assert {tensor.dtype for tensor in written.values()} == {
        torch.float32 if save_dtype == "float32" else torch.bfloat16
    }
    loaded = load_converted(tmp_path / "out").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = made.model.get_input_embeddings().weight.to(next(iter(written.values())).dtype)
    assert torch.equal(written["model.embed_tokens.weight"], expected)
