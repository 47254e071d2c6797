"""Weights that bitsandbytes quantized come back as plain numbers.

Run by name: where bitsandbytes is installed, all training imports it, which takes a second.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from decausal.models.adapt import load_source
from tests.runs import assert_saved_as_plain, save_source


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])  # a family whose weights stand the other way round, too
def test_weights_of_bitsandbytes_come_back_as_plain_numbers(family: str, num_bits: int, tmp_path: Path) -> None:
    directory, stored = save_source(tmp_path / "model", family), BitsAndBytesConfig(**{f"load_in_{num_bits}bit": True})
    plain = load_source(directory)[0]
    packed = AutoModelForCausalLM.from_pretrained(directory, quantization_config=stored, device_map={"": "cpu"})
    ids = torch.arange(12)[None]
    packed.save_pretrained(directory)
    assert load_file(directory / "model.safetensors").keys() != plain.state_dict().keys()
    model, tokenizer = load_source(directory)
    for name, tensor in plain.state_dict().items():
        assert (model.state_dict()[name] - tensor).norm() <= (0.5 if num_bits == 4 else 0.02) * tensor.norm()
    with torch.no_grad():
        expected = packed.dequantize(torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_saved_as_plain(model, tokenizer, tmp_path / "out")
