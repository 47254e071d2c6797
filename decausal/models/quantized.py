"""Loads quantized weights, from GGUF files and other methods, which transformers turns back into plain numbers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.pytorch_utils import Conv1D

from decausal.models.adapters import hushed

_TRACES = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_device_map")


def dequantizing(config: PretrainedConfig, where: dict[str, Any]) -> dict[str, Any]:
    """Makes transformers load quantized weights as plain numbers: returns keywords and changes `config`."""
    if "gguf_file" in where:
        _keep_the_bar_of_gguf_quiet()
        made = getattr(transformers, "GgufConfig", None)  # versions without it have no other way
        return {} if made is None else {"quantization_config": made(gguf_file=where["gguf_file"], dequantize=True)}
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return {}
    config.quantization_config = stored | {"dequantize": True}  # which bitsandbytes does not know: see `plain`
    return {"device_map": {"": "cpu"}}


def _keep_the_bar_of_gguf_quiet() -> None:
    """Hides transformers' bar while a GGUF file is dequantized, which ignores its switch for bars."""
    if hasattr(modeling_gguf_pytorch_utils, "tqdm"):
        modeling_gguf_pytorch_utils.tqdm = transformers.logging.tqdm


def plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a quantized model with plain layers, and without traces of quantization when it is saved."""
    if hasattr(model, "is_loaded_in_4bit") or hasattr(model, "is_loaded_in_8bit"):  # by bitsandbytes
        with hushed():
            model = model.dequantize(dtype)
        _turn_back(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in _TRACES:
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model._weight_conversions = None  # otherwise transformers would convert weights back to the file's form
    return model


def _turn_back(model: PreTrainedModel) -> None:
    """Restores GPT-2's Conv1D, which bitsandbytes replaces by Linear, with transposed weights."""
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(model.config)
    for name, layer in stock.named_modules():
        if isinstance(layer, Conv1D):
            linear = model.get_submodule(name)
            layer.weight, layer.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
            model.set_submodule(name, layer)
