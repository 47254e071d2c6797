"""Weights of few bits come back as plain numbers, and are written as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decausal.models.adapt import load_source
from tests.runs import assert_saved_as_plain, save_source


def configure(directory: Path, **stored: Any) -> None:
    """Writes how the weights are quantized where transformers looks for it."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))


def test_fp8_weights_come_back_as_plain_numbers(tmp_path: Path) -> None:
    """Each matrix of the layers in float8 with a scale for each block of 128 by 128, as DeepSeek-V3 is published."""
    directory = save_source(tmp_path / "model")
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().max() / 448
        packed = (tensors[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = packed.float() * scale
        tensors |= {name: packed, f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    configure(directory, **stored)
    model, tokenizer = load_source(directory)
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert_saved_as_plain(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("num_bits", [4, 8])
def test_weights_of_compressed_tensors_come_back_as_plain_numbers(num_bits: int, tmp_path: Path) -> None:
    """Each matrix of the layers as whole numbers with a scale for each row; those of 4 bits packed by eights."""
    directory = save_source(tmp_path / "model")
    tensors, expected = load_file(directory / "model.safetensors"), {}
    largest = 2 ** (num_bits - 1) - 1
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / largest
        whole = (tensors[name] / scale).round().to(torch.int8)
        expected[name] = whole.float() * scale
        tensors[f"{name}_scale"] = scale
        if num_bits == 8:
            tensors[name] = whole
        else:
            tensors[f"{name}_shape"] = torch.tensor(tensors.pop(name).shape)
            unsigned = (whole.int() + 8).unflatten(1, (-1, 8))
            tensors[f"{name}_packed"] = (unsigned << torch.arange(0, 32, 4)).sum(dim=2, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "channel"}
    stored = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    stored |= {"format": "int-quantized" if num_bits == 8 else "pack-quantized"}
    stored |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    configure(directory, **stored)
    model, tokenizer = load_source(directory)
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert_saved_as_plain(model, tokenizer, tmp_path / "out")
